"""Night after night: what the parent flow does with a registry, a gate, and prompts that grow.

Real: the flow with its preflight, export, archive, registry, gate and report, and the Prefect server. Stand-ins: the
store and the two roles (a checkpoint lies there at once), and the evaluation's flow run on another pool.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from prefect import State
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Completed

from disagg_core.errors import SpecError
from disagg_core.recurring.candidate import INCUMBENT
from disagg_core.registry.references import open_registry
from disagg_core.registry.registry import Registry
from disagg_core.report.archive import verify_archive
from disagg_core.report.document import RunReport
from disagg_core.run.plan import RunPlan
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import get_settings
from flows import online_disagg_training as parent
from tasks import evaluation, preflight, run_slot
from tests.integration.flows.conftest import PrefectServer
from tests.integration.flows.test_evaluation import EVALUATED, TINY, completed, store_at_hand, trained_at_once

pytestmark = pytest.mark.integration

Measures = Callable[..., object]


def measured(own: int, incumbent: int) -> Measures:
    """An evaluation in which the draft's passes give `own` tokens in ten, and the champion's `incumbent`."""

    async def run_child(_: str, __: str, parameters: dict[str, dict[str, object]], **___: object) -> FlowRun:
        plan = RunPlan.model_validate(parameters["plan"])
        for name, tokens in (("before", 10), ("after", own), (INCUMBENT, incumbent)):
            found = {**EVALUATED, "accept_length": tokens / 10, "by_prompt": [[tokens, 10]] * 16}
            (plan.dir.evaluation / f"{name}.json").write_text(json.dumps(found))
        return FlowRun(flow_id=uuid4(), state=Completed())

    return run_child


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """The prompts of the first night: a file that grows."""
    path = tmp_path / "prompts.jsonl"
    demo = (TINY.parent / "../../infra/demo/prompts.jsonl").resolve()
    path.write_text("".join(demo.read_text().splitlines(keepends=True)[:60]))
    return path


def grow(prompts: Path, first: int, last: int) -> None:
    demo = (TINY.parent / "../../infra/demo/prompts.jsonl").resolve()
    with prompts.open("a") as file:
        file.writelines(demo.read_text().splitlines(keepends=True)[first:last])


@pytest.fixture
def spec(api: PrefectServer, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunSpec]:
    """A document of recurring training, for a parent flow in this process whose training takes no time."""
    monkeypatch.setenv("DRAFTLINE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(parent, "feature_store_services", store_at_hand)
    monkeypatch.setattr(parent, "run_attempt", trained_at_once)
    monkeypatch.setattr(parent, "verify_completion", completed)
    for module in (preflight, run_slot):
        monkeypatch.setattr(module, "check_pools", lambda *_, **__: None)  # the server has none
    get_settings.cache_clear()
    changes = [
        f"data.prompts={prompts}",
        "recurring.min_new_prompts=20",
        "gate.min_gain=0.0",
        "gate.approval=never",
        f"registry.url={tmp_path}/registry",
    ]
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 30}):
        yield load_spec(TINY, changes)
    get_settings.cache_clear()


@pytest.fixture
def registry(spec: RunSpec) -> Registry:
    return open_registry(spec, get_settings())


@pytest.fixture
def night(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> Callable[[Measures], State[RunReport]]:
    """Run a night whose evaluation goes as given; return its end state."""

    def run(measures: Measures) -> State[RunReport]:
        monkeypatch.setattr(evaluation, "run_child", measures)
        state: State[RunReport] = asyncio.run(parent.online_disagg_training(spec, return_state=True))
        return state

    return run


def reports(home: Path) -> list[RunReport]:
    """The reports of all runs."""
    return [RunReport.model_validate_json(path.read_bytes()) for path in home.glob("home/runs/*/report.json")]


def test_four_nights(
    night: Callable[[Measures], State[RunReport]], registry: Registry, prompts: Path, tmp_path: Path
) -> None:
    first = night(measured(15, 0))
    assert (first.name, first.type.value) == ("Promoted", "COMPLETED")
    assert "there is no champion yet" in str(first.message)
    champion = registry.champion()
    assert champion is not None
    assert champion.label == "v1"
    assert champion.provenance.data is not None
    assert champion.provenance.data.prompts == 60
    assert champion.provenance.parent is None

    grow(prompts, 60, 100)
    second = night(measured(18, 15))
    assert second.name == "Promoted"
    champion = registry.champion()
    assert champion is not None
    assert champion.label == "v2"
    assert champion.provenance.parent == registry.url_of(1)
    assert champion.provenance.data is not None
    assert champion.provenance.data.prompts == 100

    with prompts.open("a") as file:
        file.writelines(json.dumps({"prompt": "?", "response": "no " * 30}) + "\n" for _ in range(30))
    third = night(measured(12, 18))
    assert (third.name, third.type.value) == ("Rejected", "COMPLETED")
    assert "gate.min_gain +0.0% is missed" in str(third.message)
    champion = registry.champion()
    assert champion is not None
    assert champion.label == "v2"
    assert len(registry.versions()) == 3

    fourth = night(measured(0, 0))
    assert (fourth.name, fourth.type.value) == ("Skipped", "COMPLETED")
    assert fourth.message == "nothing new: 0 prompts since v3 (not promoted), recurring.min_new_prompts is 20"
    assert len(registry.versions()) == 3

    assert registry.rollback(by="us").version == 1
    archives = list((tmp_path / "home" / "archive").iterdir())
    assert len(archives) == 3
    for archive in archives:
        assert verify_archive(str(archive)) > 5
    for number in (1, 2, 3):
        registry.verify(number)
    decisions = {report.gate.decision for report in reports(tmp_path) if report.gate is not None}
    assert decisions == {"promoted", "rejected"}


def test_a_champion_that_moved_meanwhile_is_not_replaced(
    night: Callable[[Measures], State[RunReport]], registry: Registry, monkeypatch: pytest.MonkeyPatch, prompts: Path
) -> None:
    night(measured(15, 0))
    grow(prompts, 60, 100)
    night(measured(18, 15))
    grow(prompts, 100, 140)
    better = measured(20, 18)

    async def measured_while_somebody_rolls_back(*arguments: object, **options: object) -> object:
        registry.rollback(by="somebody")
        return await better(*arguments, **options)  # type: ignore[misc]

    third = night(measured_while_somebody_rolls_back)
    assert third.name == "Rejected"
    assert "somebody rolled back to v1" in str(third.message)


def test_what_the_gate_decides_is_not_said_twice(spec: RunSpec, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"expected gate\.min_accept_length"):
        load_spec(TINY, ["registry.publish=true", "evaluation.min_accept_length=1.2"])
    with pytest.raises(SpecError, match=r"recurring: expected data\.holdout"):
        load_spec(TINY, ["recurring.replay=0.1", "data.holdout=null"])
