"""A forecast from a run document alone: stages, the best split, what breaks first as the pipeline grows."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from disagg_core.capacity.hardware import hardware_of
from disagg_core.capacity.model import Split, best_split, forecast, owners_needed, refs_needed
from disagg_core.capacity.work import SampleWork, work_of
from disagg_core.cli.plan_simulation import Question, simulation_of
from disagg_core.errors import BadInput
from disagg_core.run.plan import RunPlan, make_plan
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.target.facts import read_target_facts

pytestmark = pytest.mark.unit

SPEC = Path(__file__).resolve().parents[3] / "infra" / "runs" / "qwen3-8b-eagle3.yaml"
H100 = hardware_of("h100")
FAST_STORE = hardware_of("h100", owner_gbs=50.0)

WORK = SampleWork(
    tokens=1000,
    new_tokens=0,
    sample_bytes=33e6,
    prefill_flops=14e12,
    training_flops=28e12,
    weight_bytes=16e9,
    trained=400_000_000,
    batch=4,
    decoded_together=16,
)
"""About a sample of 1,000 tokens of Qwen3-8B and its EAGLE-3 draft: training takes twice what capture takes."""


@pytest.fixture(scope="module")
def plan() -> RunPlan:
    spec = load_spec(SPEC)
    return make_plan(spec, read_target_facts(spec.target), run_id="r", root=Path("r"), total_prompts=1000)


def test_the_work_of_a_sample_follows_from_the_document(plan: RunPlan) -> None:
    work = work_of(plan, tokens=1000)
    assert work.sample_bytes == 1000 * plan.bytes_per_token
    assert work.prefill_flops == pytest.approx(2 * 1000 * 6.95e9, rel=0.05), "Qwen3-8B has 6.95 billion beside its head"
    assert work.new_tokens == 500
    assert work.batch == 4
    assert work_of(plan, tokens=2000).training_flops == pytest.approx(2 * work.training_flops, rel=0.01)


def test_the_pipeline_is_as_fast_as_its_slowest_stage_and_the_others_wait() -> None:
    found = forecast(WORK, FAST_STORE, Split(servers=4, gpus_per_server=1, ranks=4))
    assert found.bottleneck == "training"
    assert found.samples_per_s == found.stages["training"]
    assert found.idle["training"] == 0.0
    assert found.idle["capture"] == pytest.approx(0.5, abs=0.02)


def test_the_best_split_gives_each_side_gpus_in_proportion_to_its_work() -> None:
    assert best_split(WORK, FAST_STORE, 9).split == Split(3, 1, 6)
    assert best_split(WORK, FAST_STORE, 8, gpus_per_server=2).split.gpus == 8
    with pytest.raises(BadInput, match="expected at least 3, one server of 2"):
        best_split(WORK, FAST_STORE, 2, gpus_per_server=2)


def test_ranks_that_share_samples_come_in_whole_groups_and_each_fetches_all_of_them() -> None:
    alone, shared = (
        forecast(WORK, FAST_STORE, Split(servers=1, gpus_per_server=1, ranks=8, shared_by=n)) for n in (1, 4)
    )
    assert (alone.global_batch, shared.global_batch) == (32, 8)
    for stage in ("get", "store"):
        assert shared.stages[stage] == alone.stages[stage] / 4
    assert shared.step_s - shared.reduce_s == pytest.approx((alone.step_s - alone.reduce_s) / 4)
    assert shared.stages["training"] < alone.stages["training"], "a smaller step reduces as many gradients"
    assert owners_needed(shared, FAST_STORE) >= owners_needed(alone, FAST_STORE)

    assert best_split(WORK, FAST_STORE, 9, shared_by=4).split == Split(2, 1, 4, shared_by=4)
    assert best_split(WORK, FAST_STORE, 8, gpus_per_server=2, shared_by=3).split == Split(1, 2, 6, shared_by=3)
    left = best_split(WORK, FAST_STORE, 5, gpus_per_server=2, shared_by=2).split
    assert (left.ranks, left.gpus) == (2, 4), "the fifth is neither a server nor a group"
    with pytest.raises(BadInput, match=r"at least 5, one server of 1 .* and 4 trainers \(training.context_parallel\)"):
        best_split(WORK, FAST_STORE, 4, shared_by=4)


def test_the_plan_of_shared_samples_proposes_splits_that_its_document_could_have(plan: RunPlan) -> None:
    shared = load_spec(SPEC, ["training.processes=4", "training.context_parallel=4"])
    sharing = make_plan(shared, plan.target, run_id="r", root=Path("r"), total_prompts=1000)
    console = Console(width=140, record=True, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(simulation_of(sharing, Question(FAST_STORE, gpus=11, tokens=1000)))
    assert "best of 11 GPUs" in captured.get()
    assert captured.get().count("in groups of 4") >= 2


def test_with_more_gpus_the_single_store_owner_breaks_first_and_more_owners_mend_it() -> None:
    small, large = (best_split(WORK, H100, gpus) for gpus in (3, 128))
    assert small.bottleneck != "store"
    assert large.bottleneck == "store"
    wanted = owners_needed(best_split(WORK, H100, 128, owners=1000), H100)
    mended = best_split(WORK, H100, 128, owners=wanted)
    assert mended.bottleneck in ("capture", "training")
    assert mended.samples_per_s > 5 * large.samples_per_s


def test_the_watermark_has_to_hold_what_is_captured_and_trained_at_a_time() -> None:
    found = best_split(WORK, FAST_STORE, 9)
    captured_s = 16 * 3 / found.stages["capture"]
    assert refs_needed(found, 16) == pytest.approx(found.samples_per_s * (captured_s + found.step_s) + 48, abs=1)


def test_the_price_of_a_million_tokens_is_that_of_the_gpus_while_they_are_trained() -> None:
    found = best_split(WORK, hardware_of("h100", owner_gbs=50.0, price=3.6), 9)
    assert found.cost_per_million_tokens == pytest.approx(9 * 0.001 / (found.samples_per_s * 1000) * 1e6)
    assert best_split(WORK, FAST_STORE, 9).cost_per_million_tokens is None


def test_an_unknown_gpu_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(BadInput, match="expected one of a100, h100, h200, b200, found tpu"):
        hardware_of("tpu")


def test_people_see_the_documents_split_beside_the_best_one_and_the_simulation(plan: RunPlan) -> None:
    console = Console(width=140, record=True, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(simulation_of(plan, Question(FAST_STORE, gpus=16, tokens=1000)))
    shown = captured.get()
    for part in ("as the document says", "best of 16 GPUs", "bottleneck", "memory in flight", "of the forecast"):
        assert part in shown
    assert "would do" in shown
