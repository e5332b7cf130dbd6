from __future__ import annotations

from pathlib import Path

import pytest

from disagg_core.contracts import PromptTask
from disagg_core.engines.contract import Captured, ServerHealth
from disagg_core.roles.producer_files import RejectedFile, Reporter
from disagg_core.rollout.meter import RolloutMeter
from disagg_core.rollout.producer import DriveState
from disagg_core.rollout.prompt_source import Rejection
from disagg_core.run.metrics import JsonlMetrics, read_metrics
from disagg_core.run.phases import PRODUCER_PHASES, seconds_of, shares_of
from disagg_core.run.plan import RoleAssignment, make_plan
from disagg_core.run.progress import ProgressFile, read_progress
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.store.transfers import COUNTERS
from disagg_core.target.facts import read_target_facts

pytestmark = pytest.mark.unit

SPEC = Path(__file__).resolve().parents[3] / "infra" / "runs" / "qwen3-8b-eagle3.yaml"


class Target:
    def health(self) -> list[ServerHealth]:
        return [ServerHealth("local")]


class Store:
    counters = {name: number for number, name in enumerate(COUNTERS)}


def state(published: int, rejected: int, *, final: bool = False) -> DriveState:
    return DriveState(
        published=published,
        published_bytes=0,
        rejected=rejected,
        admitted=0,
        in_flight=0,
        blocked=False,
        blocked_s=0.0,
        final=final,
    )


def test_progress_counts_answered_prompts_up_to_the_total_with_those_of_earlier_attempts(tmp_path: Path) -> None:
    spec = load_spec(SPEC)
    plan = make_plan(spec, read_target_facts(spec.target), run_id="run", root=tmp_path, total_prompts=100)
    endpoints = StoreEndpoints(master_address="a:1", metrics_address="a:2")
    assignment = RoleAssignment(plan=plan, attempt=2, store=endpoints)
    with JsonlMetrics(tmp_path / "rollout.jsonl") as metrics:
        progress = ProgressFile(tmp_path / "producer.json", interval_s=0.0)
        report = Reporter(assignment, metrics, progress, Target(), Store(), covered=40)
        report(state(published=5, rejected=1, final=True), RolloutMeter())
    shown = read_progress(tmp_path / "producer.json")
    assert (shown["prompts"], shown["total_prompts"], shown["published"]) == (46, 100, 5)
    (line,) = read_metrics(tmp_path / "rollout.jsonl")
    assert line["store_put_retries"] == Store.counters["put_retries"]


def test_the_time_of_the_workers_is_split_without_a_remainder_and_shown_as_shares(tmp_path: Path) -> None:
    spec = load_spec(SPEC)
    plan = make_plan(spec, read_target_facts(spec.target), run_id="run", root=tmp_path, total_prompts=100)
    assignment = RoleAssignment(plan=plan, attempt=1, store=StoreEndpoints(master_address="a:1", metrics_address="a:2"))
    now = [0.0]
    meter = RolloutMeter(workers=2, clock=lambda: now[0])
    task = PromptTask(ordinal=0, source="p:0", input_ids=[1], loss_mask=[1])
    meter.captured(Captured(task, {}, 1, generate_s=4.0, capture_s=2.0, copy_s=0.5))
    meter.waited_for_putter(0.5)
    meter.put(1.5)
    meter.published(2, 2, 100, 0.25)
    meter.blocked(8.0)
    now[0] = 10.0

    with JsonlMetrics(tmp_path / "rollout.jsonl") as metrics:
        progress = ProgressFile(tmp_path / "producer.json", interval_s=0.0)
        Reporter(assignment, metrics, progress, Target(), Store(), covered=0)(state(2, 0, final=True), meter)

    (line,) = read_metrics(tmp_path / "rollout.jsonl")
    phases = seconds_of(line, PRODUCER_PHASES)
    assert phases == {"space": 8.0, "generate": 4.0, "prefill": 2.0, "d2h": 0.5, "put": 0.5, "other": 5.0}
    assert sum(phases.values()) == 2 * 10.0, "two workers for ten seconds"
    assert (line["put_beside_s"], line["publish_s"]) == (1.5, 0.25)
    shown = read_progress(tmp_path / "producer.json")
    assert (shown["share_space"], shown["share_generate"]) == (0.4, 0.2)
    assert shown["infer_capacity"] == pytest.approx(2 / 6.0), "two workers, twelve seconds that were not held up"


def test_a_batch_that_takes_several_intervals_is_counted_once() -> None:
    """What it takes is known when it is done: until then it is everything else, and is taken off that."""
    now = [0.0]
    meter = RolloutMeter(clock=lambda: now[0])
    task = PromptTask(ordinal=0, source="p:0", input_ids=[1], loss_mask=[1])
    intervals = []
    for second in (5.0, 10.0, 15.0):
        if second == 15.0:
            meter.captured(Captured(task, {}, 1, generate_s=12.0, capture_s=2.0))
        now[0] = second
        intervals.append(seconds_of(meter.interval(), PRODUCER_PHASES))

    sums = {phase: sum(interval[phase] for interval in intervals) for phase in PRODUCER_PHASES}
    assert (sums["generate"], sums["prefill"], sums["other"]) == (12.0, 2.0, 1.0)
    assert shares_of(intervals[-1])["other"] == 0.0


def test_a_damaged_line_of_the_rejected_prompts_costs_that_line_only(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    rejections = [
        Rejection(ordinal=number, source=f"p:{number}", kind="rejected", reason="r", attempts=1) for number in range(3)
    ]
    with RejectedFile(path) as file:
        for rejection in rejections:
            file.write(rejection)
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:-30] + bytes(30) + b"\n" + third + third[:-5])
    with RejectedFile(path) as file:
        assert file.ordinals == {0, 2}
        file.write(rejections[1])
    with RejectedFile(path) as file:
        assert file.ordinals == {0, 1, 2}
