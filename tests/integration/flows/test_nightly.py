"""Night after night: what the parent flow does with a registry, a gate, and prompts that grow.

Real: the flow with its preflight, export, archive, registry, gate and report, and the Prefect server. Stand-ins: the
store and the two roles (a checkpoint lies there at once), and the evaluation's flow run on another pool. Where a person
is asked, this process does what the worker of the deployment does.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prefect import State, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow_async
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import Completed

from disagg_core.errors import BadInput, SpecError
from disagg_core.recurring.candidate import INCUMBENT
from disagg_core.registry.references import open_registry
from disagg_core.registry.registry import Registry
from disagg_core.report.archive import verify_archive
from disagg_core.report.document import RunReport
from disagg_core.run.attempts import AttemptOutcome
from disagg_core.run.plan import RunPlan, run_id_of
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import get_settings
from flows import online_disagg_training as parent
from flows.cli.approval import approve, reject
from flows.platform.deployments import NIGHTLY
from tasks import evaluation, preflight, promotion, run_slot
from tasks.reporting import Event
from tasks.roles import Role, RoleRun
from tests.integration.flows.conftest import PrefectServer
from tests.integration.flows.test_evaluation import EVALUATED, TINY, completed, store_at_hand
from tests.integration.registry.kit import make_draft, provenance

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


async def trained_by_both_roles(plan: RunPlan, *_: object) -> tuple[AttemptOutcome, dict[Role, RoleRun]]:
    """An attempt that takes no time."""
    roles: tuple[Role, ...] = ("producer", "consumer")
    ended = {"work_pool": "p", "state": "Completed", "message": "", "started": None, "ended": None}
    return AttemptOutcome(attempt=1), {
        role: RoleRun.model_validate({"role": role, "flow_run_id": uuid4(), **ended}) for role in roles
    }


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
    monkeypatch.setattr(parent, "run_attempt", trained_by_both_roles)
    monkeypatch.setattr(parent, "verify_completion", completed)
    for module in (preflight, run_slot):
        monkeypatch.setattr(module, "check_pools", lambda *_, **__: None)  # the server has none
    get_settings.cache_clear()
    changes = [
        f"data.prompts={prompts}",
        "recurring.min_new_prompts=20",
        "gate.min_gain=0.0",
        "gate.approval=never",
        "tracking.tensorboard=false",
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


class Asked:
    """A night whose draft a person decides about, of the deployment `nightly`."""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec.model_copy(update={"gate": spec.gate.model_copy(update={"approval": "always"})})
        self.id = UUID(int=0)

    def until_it_waits(self) -> None:
        """Begin a run, until it is suspended and its process ends."""
        asyncio.run(self._begin())
        assert self.state() == "Suspended"

    async def _begin(self) -> None:
        async with get_client() as client:
            deployment = await client.read_deployment_by_name(f"{parent.online_disagg_training.name}/{NIGHTLY}")
            self.id = (await client.create_flow_run_from_deployment(deployment.id)).id
        with pytest.raises(Pause):
            await self._run()

    async def _run(self) -> State[RunReport]:
        async with get_client() as client:
            flow_run = await client.read_flow_run(self.id)
        given = {"spec": self.spec}
        state: State[RunReport] = await run_flow_async(
            parent.online_disagg_training, flow_run=flow_run, parameters=given, return_type="state"
        )
        return state

    def to_its_end(self) -> State[RunReport]:
        """Go on with a run that was answered; return its end state."""
        return asyncio.run(self._run())

    def state(self) -> str | None:
        """Return the name of the run's state."""

        async def read() -> str | None:
            async with get_client() as client:
                state = (await client.read_flow_run(self.id)).state
            return state.name if state is not None else None

        return asyncio.run(read())

    @property
    def run_id(self) -> str:
        return run_id_of(self.spec, self.id)


@pytest.fixture
def asked(spec: RunSpec, registered: PrefectServer, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """A night that waits for a person, whose draft is worth something."""
    monkeypatch.setenv("PREFECT_API_URL", registered.api_url)
    monkeypatch.setattr(evaluation, "run_child", measured(15, 0))
    night = Asked(spec)
    night.until_it_waits()
    return night


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What automations are told of the gate, in order."""
    events: list[str] = []
    emit = promotion.emit

    def noted(plan: RunPlan, event: Event, **payload: str | None) -> None:
        events.append(event)
        emit(plan, event, **payload)

    monkeypatch.setattr(promotion, "emit", noted)
    return events


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


def test_a_draft_that_is_approved_becomes_the_champion(
    told: list[str], asked: Asked, registry: Registry, tmp_path: Path
) -> None:
    assert registry.champion() is None
    (waiting,) = reports(tmp_path)
    assert waiting.gate is not None
    assert waiting.gate.decision == "needs_approval"

    approve(asked.run_id, comment="a beginning")
    end = asked.to_its_end()
    assert (end.name, end.type.value) == ("Promoted", "COMPLETED")
    assert "approved by a person: a beginning" in str(end.message)
    champion = registry.champion()
    assert champion is not None
    assert champion.label == "v1"
    (event,) = registry.history()
    assert "approved by a person: a beginning" in event.reason
    with pytest.raises(BadInput, match="expected a run that waits for approval, found one that is Promoted"):
        approve(asked.run_id)
    assert told == ["needs-approval", "promoted"]


def test_the_report_after_an_approval_has_what_the_process_before_it_knew(asked: Asked, tmp_path: Path) -> None:
    (waiting,) = reports(tmp_path)
    assert set(waiting.roles) == {"producer", "consumer"}
    assert [attempt.attempt for attempt in waiting.attempts] == [1]
    approve(asked.run_id)
    asked.to_its_end()
    (report,) = reports(tmp_path)
    assert (report.attempts, report.roles) == (waiting.attempts, waiting.roles)
    assert report.seconds >= waiting.seconds
    assert report.archive is not None
    assert RunReport.model_validate_json((Path(report.archive.url) / "report.json").read_bytes()) == report


@pytest.mark.parametrize("for_the_target", [True, False], ids=["for this target", "for another target"])
def test_an_approval_replaces_no_champion_that_the_draft_was_not_judged_against(
    asked: Asked, registry: Registry, tmp_path: Path, for_the_target: bool
) -> None:
    """While nobody answers, somebody else takes another version into service."""
    version = registry.version(1).provenance.target_version if for_the_target else "another"
    by_hand = registry.publish(make_draft(tmp_path / "by-hand"), provenance("by-hand", target_version=version))
    registry.promote(by_hand.number, instead_of=None, by="somebody")

    approve(asked.run_id, comment="a beginning")
    end = asked.to_its_end()
    assert (end.name, end.type.value) == ("Rejected", "COMPLETED")
    assert "approved by a person: a beginning" in str(end.message)
    assert "v1 was to take the place of none, but somebody promoted v2" in str(end.message)
    champion = registry.champion()
    assert champion is not None
    assert champion.label == "v2"
    assert len(registry.history()) == 1
    assert [known.label for known in registry.versions()] == ["v1", "v2"]
    (report,) = reports(tmp_path)
    assert report.gate is not None
    assert report.gate.decision == "rejected"


def test_a_draft_that_a_person_rejects_ends_its_run_as_rejected(
    asked: Asked, registry: Registry, tmp_path: Path
) -> None:
    reject(asked.run_id, comment="too little")
    end = asked.to_its_end()
    assert (end.name, end.type.value) == ("Rejected", "COMPLETED")
    assert registry.champion() is None
    assert len(registry.versions()) == 1
    (report,) = reports(tmp_path)
    assert report.gate is not None
    assert report.gate.reasons[-1] == "rejected by a person: too little"
