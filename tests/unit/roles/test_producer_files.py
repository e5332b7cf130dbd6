from __future__ import annotations

from pathlib import Path

import pytest

from disagg_core.engines.contract import ServerHealth
from disagg_core.roles.producer_files import RejectedFile, Reporter
from disagg_core.rollout.meter import RolloutMeter
from disagg_core.rollout.producer import DriveState
from disagg_core.rollout.prompt_source import Rejection
from disagg_core.run.metrics import JsonlMetrics, read_metrics
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
