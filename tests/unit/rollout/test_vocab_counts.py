"""The vocabulary map as a step of the producer: counted once, reused by later runs over the same inputs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from disagg_core.contracts import PromptTask
from disagg_core.drafts.vocab import version_of
from disagg_core.engines.contract import Generated
from disagg_core.errors import BadInput, TargetUnavailable
from disagg_core.prompts.pinned import PinnedData, PinnedFile
from disagg_core.prompts.pool import GivenTasks
from disagg_core.rollout import vocab_counts as module
from disagg_core.rollout.vocab_counts import vocab_maps_of
from disagg_core.run.plan import RunPlan, make_plan
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.target.facts import read_target_facts

pytestmark = pytest.mark.unit

DEMO = Path(__file__).resolve().parents[3] / "infra" / "runs" / "demo.yaml"


class Untouched:
    """A target that must not be asked: these prompts bring their own continuations."""


def a_plan(folder: Path, prompts: Path, run_id: str) -> RunPlan:
    spec = load_spec(DEMO, ["data.generate=null", "draft.vocab_size=4", f"data.prompts={prompts}"])
    return make_plan(
        spec,
        read_target_facts(spec.target),
        run_id=run_id,
        root=folder / run_id,
        total_prompts=2,
        data=PinnedData(prompts=PinnedFile.of(prompts.read_bytes())),
    )


def tasks(*rows: list[int]) -> GivenTasks:
    return GivenTasks(
        [
            PromptTask(ordinal=ordinal, source="x", input_ids=[9, *row], loss_mask=[0, *[1] * len(row)])
            for ordinal, row in enumerate(rows)
        ]
    )


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"text": "x"}) + "\n")
    return path


def test_the_tokens_that_are_trained_on_most_make_the_draft_vocabulary(tmp_path: Path, prompts: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    plan = a_plan(tmp_path, prompts, "first")
    (made,) = vocab_maps_of(
        plan,
        tasks([5, 5, 7, 7, 7], [300, 300, 2]),
        Untouched(),
        cache=tmp_path / "cache",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert made.target_ids.tolist() == [2, 5, 7, 300]
    assert not made.t2d[9]
    assert seen == [(2, 2)]
    assert plan.dir.vocab_map.is_file()


def test_a_later_run_over_the_same_inputs_counts_nothing(tmp_path: Path, prompts: Path) -> None:
    arguments = {"cache": tmp_path / "cache", "progress": lambda done, total: None}
    (first,) = vocab_maps_of(a_plan(tmp_path, prompts, "first"), tasks([5, 7]), Untouched(), **arguments)
    (again,) = vocab_maps_of(a_plan(tmp_path, prompts, "again"), tasks([1, 1, 1, 1]), Untouched(), **arguments)
    assert again.version == first.version
    prompts.write_text("other\n")
    (other,) = vocab_maps_of(a_plan(tmp_path, prompts, "other"), tasks([1, 2, 3, 4]), Untouched(), **arguments)
    assert other.target_ids.tolist() == [1, 2, 3, 4]


class Away:
    """A target that is away for the first calls, the second time in the middle of a batch."""

    batch_size = 2
    concurrency = 1

    def __init__(self, calls: int) -> None:
        self.calls = calls
        self.asked: list[list[int]] = []

    def generate(self, batch: Sequence[PromptTask], *, avoid: object) -> Iterator[Generated]:
        self.asked.append([task.ordinal for task in batch])
        if len(self.asked) == 2:
            yield Generated(batch[0], [5, 6])
        if len(self.asked) <= self.calls:
            raise TargetUnavailable("no server is usable at present")
        for task in batch:
            yield Generated(task, [7, 8])


def a_generating_plan(folder: Path, prompts: Path, *overrides: str) -> RunPlan:
    spec = load_spec(DEMO, ["draft.vocab_size=4", f"data.prompts={prompts}", *overrides])
    return make_plan(spec, read_target_facts(spec.target), run_id="run", root=folder / "run", total_prompts=2)


def test_a_target_that_is_away_for_a_moment_is_waited_for(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AWAY_PAUSE_S", 0.0)
    monkeypatch.setattr(module, "_REPORT_S", float("inf"))
    target, seen = Away(calls=2), []
    (made,) = vocab_maps_of(
        a_generating_plan(tmp_path, prompts),
        tasks([1], [2]),
        target,
        cache=tmp_path / "cache",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert target.asked == [[0, 1], [0, 1], [1]]
    assert made.target_ids.tolist() == [2, 5, 6, 7], "the token that ends a turn is among them, though it was not seen"
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_a_target_that_stays_away_ends_the_counting(
    tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_AWAY_PAUSE_S", 0.0)
    plan = a_generating_plan(tmp_path, prompts, "target.unavailable_timeout_s=0.01")
    with pytest.raises(TargetUnavailable, match="while counting for the vocabulary map of run: no server"):
        vocab_maps_of(
            plan, tasks([1], [2]), Away(calls=10**6), cache=tmp_path / "cache", progress=lambda done, total: None
        )


def test_nothing_to_count_is_named(tmp_path: Path, prompts: Path) -> None:
    with pytest.raises(BadInput, match="at least one usable prompt"):
        vocab_maps_of(
            a_plan(tmp_path, prompts, "none"),
            tasks(),
            Untouched(),
            cache=tmp_path / "cache",
            progress=lambda done, total: None,
        )


def test_the_tokens_of_several_drafts_are_counted_once(tmp_path: Path, prompts: Path) -> None:
    plan, seen = a_plan(tmp_path, prompts, "several"), []
    sections = [{"name": "four", "vocab_size": 4}, {"name": "whole"}, {"name": "two", "vocab_size": 2}]
    spec = RunSpec.model_validate(plan.spec.model_dump(mode="json") | {"draft": None, "drafts": sections})

    maps = vocab_maps_of(
        plan.model_copy(update={"spec": spec}),
        tasks([5, 5, 7, 7, 7], [300, 300, 300, 300, 2]),
        Untouched(),
        cache=tmp_path / "cache",
        progress=lambda done, total: seen.append((done, total)),
    )

    assert [known.d2t.numel() for known in maps] == [4, 1024, 2]
    assert maps[0].target_ids.tolist() == [2, 5, 7, 300]
    assert maps[2].target_ids.tolist() == [2, 300]
    assert seen == [(2, 2)]
    assert all((plan.root / f"drafts/{name}/vocab_map.safetensors").is_file() for name in ("four", "whole", "two"))
    assert version_of(maps[:1]) == maps[0].version
    assert version_of(maps) != version_of(maps[::-1])
