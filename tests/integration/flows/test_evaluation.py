"""The parent flow when its last step goes wrong: a night's draft is exported and archived whatever the evaluation says.

Real: the flow with its preflight, export, archive, evaluation task and report, and the Prefect server. Stand-ins: the
store and the two roles (a checkpoint lies there at once), and the evaluation's flow run on another pool.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import torch
from prefect import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import run_flow_async
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
from prefect.states import AwaitingRetry, Completed, Failed
from safetensors.torch import save_file

from disagg_core.drafts.eagle3 import Eagle3Config, Eagle3Draft
from disagg_core.drafts.export import import_draft
from disagg_core.drafts.vocab import VocabMap
from disagg_core.errors import AccountingError, EvaluationFailed, RoleFailed, TooManyLost
from disagg_core.report.archive import MANIFEST, verify_archive
from disagg_core.report.document import RunReport
from disagg_core.report.figures import figures_of
from disagg_core.report.records import REPORT_FILES
from disagg_core.run.attempts import AttemptOutcome
from disagg_core.run.outcomes import RoleOutcome
from disagg_core.run.plan import RunPlan, StoreEndpoints
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import get_settings
from flows import online_disagg_training as parent
from tasks import evaluation, preflight, run_slot
from tasks.completion import Completion, complete
from tests.integration.flows.conftest import PrefectServer

pytestmark = pytest.mark.integration

TINY = Path(__file__).resolve().parents[2] / "e2e" / "tiny.yaml"
DRAFT = {"step": 6, "skipped": 0, "seconds": 1.0, "loss_first": 5.0, "loss_last": 4.0}
EVALUATED = {
    "prompts": 4,
    "interval": (1.1, 1.5),
    "per_position": [0.2],
    "lossless": True,
    "tokens": 90,
    "seconds": 1.5,
}


class StoreAtHand:
    """A feature store that is always ready."""

    endpoints = StoreEndpoints(master_address="127.0.0.1:1", metrics_address="127.0.0.1:2")

    async def ready(self, attempt: int) -> StoreEndpoints:
        return self.endpoints

    def require_alive(self) -> None:
        """Nothing of it can die."""


@asynccontextmanager
async def store_at_hand(plan: RunPlan) -> AsyncIterator[StoreAtHand]:
    yield StoreAtHand()


async def trained_at_once(*_: object) -> tuple[AttemptOutcome, dict[str, object]]:
    return AttemptOutcome(attempt=1), {}


async def completed(plan: RunPlan, *_: object) -> Completion:
    """Leave the checkpoint of a draft that was trained on all 44 samples."""
    planned = plan.drafts[0]
    section = planned.section.model_copy(update={"vocab_size": planned.vocabulary.size})
    draft = Eagle3Draft(Eagle3Config.for_target(plan.target, section))
    draft.set_vocab_map(VocabMap.from_counts(torch.ones(plan.target.vocab_size), planned.vocabulary.size))
    checkpoint = plan.dir.checkpoints / "step-6"
    checkpoint.mkdir(parents=True)
    save_file(draft.serving_state_dict(), checkpoint / "draft.safetensors")
    (checkpoint / "config.json").write_text(json.dumps(draft.config.to_dict()))
    trained = {"steps": 6, "samples": 44, "quarantined": 0, "reason": "end of stream", "checkpoint": "step-6",
               "samples_per_second": 9.0, "parameters": {"": 1000}, "drafts": {"": DRAFT}}  # fmt: skip
    roles = ({"prompts": 44, "refs": 44, "rejected": 0}, trained)
    producer, consumer = (RoleOutcome(state="completed", started=0, ended=1, result=result) for result in roles)
    return complete(plan, 1, producer, consumer, keys_left=0)


async def its_run_fails(*_: object, **__: object) -> FlowRun:
    return FlowRun(flow_id=uuid4(), state=Failed(message="CUDA out of memory"))


async def it_cannot_be_started(*_: object, **__: object) -> FlowRun:
    raise OSError("no route to the Prefect server")


async def it_measures_the_draft(_: str, __: str, parameters: dict[str, dict[str, object]], **___: object) -> FlowRun:
    plan = RunPlan.model_validate(parameters["plan"])
    for name, length in (("before", 1.0), ("after", 1.3)):
        (plan.dir.evaluation / f"{name}.json").write_text(json.dumps({**EVALUATED, "accept_length": length}))
    return FlowRun(flow_id=uuid4(), state=Completed())


@pytest.fixture
def spec(api: PrefectServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunSpec]:
    """The tests' run document, for a parent flow in this process whose training takes no time."""
    monkeypatch.setenv("DRAFTLINE_HOME", str(tmp_path))
    monkeypatch.setattr(parent, "feature_store_services", store_at_hand)
    monkeypatch.setattr(parent, "run_attempt", trained_at_once)
    monkeypatch.setattr(parent, "verify_completion", completed)
    for module in (preflight, run_slot):
        monkeypatch.setattr(module, "check_pools", lambda *_, **__: None)  # the server has none
    get_settings.cache_clear()
    with temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: 30}):
        yield load_spec(TINY, ["evaluation.min_accept_length=1.2"])
    get_settings.cache_clear()


def report_in(home: Path) -> RunReport:
    (path,) = home.glob("runs/*/report.json")
    return RunReport.model_validate_json(path.read_bytes())


@pytest.mark.parametrize(
    ("ending", "minimum", "error", "message"),
    [
        (its_run_fails, 1.2, RoleFailed, "the evaluation ended as Failed: CUDA out of memory"),
        (it_cannot_be_started, 1.2, OSError, "no route to the Prefect server"),
        (it_measures_the_draft, 1.4, EvaluationFailed, "accept length 1.300 is below"),
    ],
)
def test_a_draft_whose_evaluation_fails_is_exported_and_archived(
    spec: RunSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ending: Callable[..., object],
    minimum: float,
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(evaluation, "run_child", ending)
    section = spec.evaluation.model_copy(update={"min_accept_length": minimum})
    with pytest.raises(error, match=message):
        asyncio.run(parent.online_disagg_training(spec.model_copy(update={"evaluation": section})))

    report = report_in(tmp_path)
    assert report.state == "failed"
    assert report.failure is not None
    assert message in report.failure.message
    if report.evaluation is None:
        assert report.failure.message.startswith("evaluation failed: ")
        assert "Retry on its page" in dict_of(report)["to resume"]
        assert f"draftline evaluate {report.run_id}" in dict_of(report)["to resume"]
    assert report.export is not None
    import_draft(Path(report.export))
    assert report.archive is not None
    assert_archived(report, ["evaluation/request.json"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"refused_reasons": {"CUDA error": 9}}, TooManyLost, "rollout.max_rejected allows 5.0%: 9 x CUDA error"),
        ({"accounting": {"store_keys_left": 1}}, AccountingError, "1 samples were left in the store"),
    ],
)
def test_a_draft_of_a_run_that_lost_too_much_is_exported_and_archived_and_tried_again_only_judged(
    spec: RunSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, dict[str, int]],
    error: type[Exception],
    message: str,
) -> None:
    async def completed_with_losses(plan: RunPlan, *_: object) -> Completion:
        found = (await completed(plan)).model_dump()
        for part, values in changes.items():
            found[part] |= values
        return Completion.model_validate(found)

    monkeypatch.setattr(parent, "verify_completion", completed_with_losses)
    monkeypatch.setattr(evaluation, "run_child", never)
    with pytest.raises(error, match=message):
        asyncio.run(parent.online_disagg_training(spec))
    report = report_in(tmp_path)
    assert report.failure is not None
    assert report.failure.message.startswith(("9 of 44 prompts", "the run's numbers"))
    assert report.failure.judged
    assert "Retry" not in dict_of(report)["to resume"]
    assert_archived(report, [])

    for step in ("feature_store_services", "run_attempt", "verify_completion"):
        monkeypatch.setattr(parent, step, never)
    with pytest.raises(error, match=message):
        asyncio.run(tried_again(spec, report))
    assert_archived(report_in(tmp_path), [])


def test_the_evaluation_of_a_good_draft_reaches_the_archive(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "run_child", it_measures_the_draft)
    asyncio.run(parent.online_disagg_training(spec))
    report = report_in(tmp_path)
    assert report.state == "completed"
    assert_archived(report, ["evaluation/before.json", "evaluation/after.json"])


def test_a_run_that_fails_before_its_end_is_archived_too(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def does_not_add_up(*_: object, **__: object) -> None:
        raise AccountingError("3 samples are unaccounted for; see redis://:hunter2@host")

    monkeypatch.setattr(parent, "verify_completion", does_not_add_up)
    with pytest.raises(AccountingError, match="3 samples are unaccounted for"):
        asyncio.run(parent.online_disagg_training(spec))
    report = report_in(tmp_path)
    assert report.state == "failed"
    assert report.export is None
    assert report.archive is not None
    assert verify_archive(report.archive.url) > 3
    archive = Path(report.archive.url)
    assert json.loads((archive / MANIFEST).read_text())["about"]["complete"] is False
    assert "unaccounted for; see redis://:***@host" in (archive / "report.json").read_text()
    assert json.loads((archive / "environment.json").read_text())["packages"]["prefect"]


def test_another_try_only_evaluates_and_reports_the_whole_run(
    spec: RunSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "run_child", its_run_fails)
    with pytest.raises(RoleFailed):
        asyncio.run(parent.online_disagg_training(spec))
    before = report_in(tmp_path)

    monkeypatch.setattr(evaluation, "run_child", it_measures_the_draft)
    for step in ("feature_store_services", "run_attempt", "verify_completion"):
        monkeypatch.setattr(parent, step, never)
    monkeypatch.setattr("disagg_core.checks.preflight.prepare_run", never)
    asyncio.run(tried_again(spec, before))

    report = report_in(tmp_path)
    assert (report.run_id, report.state) == (before.run_id, "completed")
    assert report.accounting == before.accounting
    assert report.evaluation is not None
    assert_archived(report, ["evaluation/before.json", "evaluation/after.json"])


def never(*_: object, **__: object) -> None:
    raise AssertionError("the training is complete")


async def tried_again(spec: RunSpec, report: RunReport) -> None:
    """Do what Retry on the run's page in the UI and its worker do."""
    assert report.flow_run_id is not None
    async with get_client() as client:
        await client.set_flow_run_state(UUID(report.flow_run_id), AwaitingRetry(), force=True)
        flow_run = await client.read_flow_run(UUID(report.flow_run_id))
    await run_flow_async(parent.online_disagg_training, flow_run=flow_run, parameters={"spec": spec})


def dict_of(report: RunReport) -> dict[str, str]:
    return {figure.label: figure.value for figure in figures_of(report)}


def assert_archived(report: RunReport, files: list[str]) -> None:
    """The archive is whole, has `files` and the report as it is, and a draft that can be served."""
    assert report.archive is not None
    archive = Path(report.archive.url)
    manifest = json.loads((archive / MANIFEST).read_text())["files"]
    assert verify_archive(str(archive)) == len(manifest)
    expected = {"run.json", *REPORT_FILES, "checkpoints/step-6/draft.safetensors", *files}
    assert expected <= set(manifest)
    assert any(name.startswith("tensorboard/events.out.") for name in manifest)
    assert RunReport.model_validate_json((archive / "report.json").read_bytes()) == report
    import_draft(archive / "export")
