"""Each tracker for real: TensorBoard's files, an offline run of Weights & Biases, an MLflow server on loopback.

What was written is read back with the tracker's own means. A tracker that is away, or dies, costs a warning.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from disagg_core.processes.retry import wait_until
from disagg_core.registry.registry import Registry
from disagg_core.report.document import EvaluationFigures, GateFigures, RunReport
from disagg_core.run.plan import RunPlan, make_plan
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.target.facts import read_target_facts
from disagg_core.tracking.feed import FeedState
from disagg_core.tracking.observer import Decided, Evaluated, Finished
from disagg_core.tracking.run_tracking import RunTracking
from flows.cli import app as cli
from tests.integration.registry.kit import make_draft, provenance, registry_at
from tests.ports import free_port

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SPEC = Path(__file__).resolve().parents[3] / "infra" / "runs" / "qwen3-8b-eagle3.yaml"
WITHIN_S = 280.0
MEASURED = EvaluationFigures(
    draft_tokens=5,
    prompts=16,
    accept_length_before=1.0,
    accept_length_after=2.5,
    interval_after=(2.4, 2.6),
    per_position_after=[0.75, 0.5],
    lossless=True,
)
GATE = GateFigures(
    decision="promoted",
    reasons=["all: gain of 12.0 %"],
    criteria=[],
    suites=[],
    candidate="v3",
    incumbent="v2",
    confidence=0.95,
    seed=0,
)


@pytest.fixture(autouse=True)
def _nobody_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients' own telemetry is off."""
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def a_plan(root: Path, tracking: dict[str, Any], *, drafts: tuple[dict[str, str], ...] = ()) -> RunPlan:
    document = load_spec(SPEC).model_dump(mode="json")
    document["tracking"] = {"tensorboard": False, **tracking}
    if drafts:
        document |= {"draft": None, "drafts": drafts}
    else:
        document["registry"]["publish"] = True
        document["evaluation"]["min_accept_length"] = None
    spec = RunSpec.model_validate(document)
    return make_plan(spec, read_target_facts(spec.target), run_id="night-1", root=root, total_prompts=100)


def a_report(plan: RunPlan) -> RunReport:
    return RunReport(
        run_id=plan.run_id,
        name=plan.spec.run.name,
        state="completed",
        accounting=None,
        training=None,
        evaluation=MEASURED,
        roles={},
        archive=None,
        attempts=[],
        store_counters={},
        rejected_reasons={},
        run_dir=str(plan.root),
        export=None,
        flow_run_id=None,
        seconds=1.0,
    )


def train(plan: RunPlan, folder: str, *steps: int) -> None:
    (path,) = (draft.dir.train_metrics for draft in plan.drafts if draft.folder == folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for step in steps:
            record = {"time": 1e9 + step, "step": step, "loss": 8.0 / step, "accuracies": [0.5, 0.25]}
            file.write(json.dumps(record) + "\n")


def track(plan: RunPlan) -> list[str]:
    """Track a run of four steps that is measured, promoted and completed; return what went wrong."""
    tracking = RunTracking(plan, last_s=WITHIN_S)
    tracking.start()
    for draft in plan.drafts:
        train(plan, draft.folder, 1, 2, 3, 4)
        tracking.tell(Evaluated(draft=draft.folder, figures=MEASURED))
    tracking.tell(Decided(gate=GATE, source=str(plan.root / "registry" / "000003")))
    tracking.tell(Finished(report=a_report(plan)))
    return tracking.end()


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def read_events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def test_tensorboard_reads_the_curves_of_each_draft_and_what_was_measured(tmp_path: Path) -> None:
    plan = a_plan(tmp_path, {"tensorboard": True}, drafts=({"name": "first"}, {"name": "second"}))
    assert track(plan) == []
    for folder in ("first", "second"):
        events = read_events(plan.dir.tensorboard / folder)
        assert [(e.step, e.value, e.wall_time) for e in events.Scalars("loss")] == [
            (1, 8.0, 1e9 + 1),
            (2, 4.0, 1e9 + 2),
            (3, pytest.approx(8 / 3), 1e9 + 3),
            (4, 2.0, 1e9 + 4),
        ]
        assert [e.value for e in events.Scalars("accuracies/1")] == [0.25] * 4
        assert [e.value for e in events.Scalars("evaluation/accept_length")] == [2.5]
        (decision,) = events.Tensors("run/decision/text_summary")
        assert decision.tensor_proto.string_val[0].startswith(b"**promoted**: v3")
        (identity,) = events.Tensors("run/identity/text_summary")
        assert plan.target.version.encode() in identity.tensor_proto.string_val[0]


def test_a_run_that_goes_on_in_another_process_is_one_curve(tmp_path: Path) -> None:
    plan = a_plan(tmp_path, {"tensorboard": True})
    for steps in ((1, 2), (3,)):
        train(plan, "", *steps)
        tracking = RunTracking(plan, last_s=WITHIN_S)
        tracking.start()
        assert tracking.end() == []
    assert [event.step for event in read_events(plan.dir.tensorboard).Scalars("loss")] == [1, 2, 3]


# --- Weights & Biases -------------------------------------------------------------------------------------------------


def records_of(path: Path) -> Iterator[Any]:
    """Yield the records of a ``.wandb`` file: a LevelDB log (blocks of 32 KiB) behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def test_weights_and_biases_writes_an_offline_run_that_can_be_synced(tmp_path: Path) -> None:
    plan = a_plan(tmp_path, {"wandb": {"mode": "offline", "project": "drafts"}})
    assert track(plan) == []
    (folder,) = (plan.dir.tracking / "wandb").glob("offline-run-*")
    records = list(records_of(folder / "run-night-1.wandb"))
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.project) == ("night-1", "drafts")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["document"]["run"]["name"] == "qwen3-8b-eagle3"
    assert config["identity"]["target_version"] == plan.target.version
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    logged = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]
    assert [(row["step"], row["loss"]) for row in logged] == [(1, 8.0), (2, 4.0), (3, 8.0 / 3), (4, 2.0)]
    assert logged[0]["accuracies/1"] == 0.25
    summary = [item for record in records for item in record.summary.update]
    last = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in summary}
    assert (last["decision"], last["version"], last["state"]) == ("promoted", "v3", "completed")
    assert last["evaluation/accept_length"] == 2.5


# --- MLflow -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server with an empty database, stopped at the end."""
    place, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{place}/mlflow.db", "--default-artifact-root", str(place)]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    url = f"http://127.0.0.1:{port}"
    with (place / "log").open("wb") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **quiet}, stdout=log, stderr=log, cwd=place, start_new_session=True
        )
    try:
        up = wait_until(lambda: server.poll() is not None or _answers(url), timeout_s=WITHIN_S, every_s=0.2)
        assert up, (place / "log").read_text()
        assert server.poll() is None, (place / "log").read_text()
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5, verify=False).is_success
    except httpx.TransportError:
        return False


def test_mlflow_has_the_run_its_curves_and_the_promoted_version(tmp_path: Path, mlflow_server: str) -> None:
    from mlflow import MlflowClient

    section = {"uri": mlflow_server, "experiment": "drafts", "registered_model": "tiny"}
    plan = a_plan(tmp_path, {"mlflow": section})
    assert track(plan) == []
    client = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("drafts")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("night-1", "FINISHED")
    assert run.data.params["run.name"] == "qwen3-8b-eagle3"
    assert run.data.tags["draftline.target_version"] == plan.target.version
    assert run.data.tags["draftline.decision"] == "promoted"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 8.0), (2, 4.0), (3, 8.0 / 3), (4, 2.0)]
    assert run.data.metrics["evaluation/accept_length"] == 2.5
    champion = client.get_model_version_by_alias("tiny", "champion")
    assert champion.source == f"draftline:{tmp_path}/registry/000003"
    assert (champion.tags["draftline.version"], champion.run_id) == ("v3", run.info.run_id)

    tracking = RunTracking(plan, last_s=WITHIN_S)  # a later process of the run that says the same again
    tracking.start()
    train(plan, "", 5)
    tracking.tell(Decided(gate=GATE, source=str(tmp_path / "registry" / "000003")))
    assert tracking.end() == []
    (run,) = client.search_runs([experiment.experiment_id])
    assert len(client.get_metric_history(run.info.run_id, "loss")) == 5
    assert len(client.search_model_versions("name = 'tiny'")) == 1


@pytest.fixture
def nights(tmp_path: Path) -> Registry:
    """Two versions that nobody has promoted, of runs whose documents name a model of MLflow's registry."""
    registry = registry_at(str(tmp_path / "registry"))
    document = {"tracking": {"mlflow": {"registered_model": tmp_path.name}}}
    for night in (1, 2):
        registry.publish(make_draft(tmp_path / f"{night}", night), provenance(f"night-{night}", document=document))
    return registry


@pytest.fixture
def drafts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run ``draftline drafts`` on the registry of the test; return the exit code."""

    def run(command: str, *arguments: str) -> int:
        place = ["--registry", str(tmp_path / "registry")]
        monkeypatch.setattr(sys, "argv", ["draftline", "drafts", command, *arguments, *place])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0)

    return run


def test_mlflow_has_the_champion_that_a_person_has_made_one(
    nights: Registry, drafts: Callable[..., int], mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    client = MlflowClient(mlflow_server)
    for number, command in ((1, ("promote", "v1")), (2, ("promote", "v2")), (1, ("rollback",))):
        assert drafts(*command) == 0
        champion = client.get_model_version_by_alias(tmp_path.name, "champion")
        known = (champion.tags["draftline.version"], champion.tags["draftline.run_id"], champion.source)
        assert known == (f"v{number}", f"night-{number}", f"draftline:{nights.url_of(number)}")
    assert len(client.search_model_versions(f"name = '{tmp_path.name}'")) == 2


def test_a_champion_is_moved_although_mlflow_is_away_and_told_later(
    nights: Registry,
    drafts: Callable[..., int],
    mlflow_server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    assert drafts("promote", "v2") == 0
    said = capsys.readouterr()
    assert "promoted v2" in said.out
    assert f"warning: MLflow's model {tmp_path.name} was not told that v2 is the champion" in said.err
    assert "draftline drafts mirror tells it again" in said.err
    assert nights.history()[-1].version == 2
    assert drafts("mirror") == 1

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    assert drafts("mirror") == 0
    assert f"v2 is the champion of {tmp_path.name}" in capsys.readouterr().out
    champion = MlflowClient(mlflow_server).get_model_version_by_alias(tmp_path.name, "champion")
    assert champion.tags["draftline.version"] == "v2"


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_server_that_is_away_costs_a_warning_and_no_more(tmp_path: Path) -> None:
    plan = a_plan(tmp_path, {"tensorboard": True, "mlflow": {"uri": f"http://127.0.0.1:{free_port()}"}})
    train(plan, "", 1, 2, 3, 4)
    tracking = RunTracking(plan, last_s=5.0)
    tracking.start()

    def state(tracker: str) -> FeedState:
        return FeedState.read(plan.dir.tracking / f"{tracker}.json")

    assert wait_until(lambda: state("mlflow").problem, timeout_s=WITHIN_S, every_s=0.2)
    assert wait_until(lambda: state("tensorboard").positions, timeout_s=WITHIN_S, every_s=0.2)
    tracking.tell(Finished(report=a_report(plan)))
    (problem,) = tracking.end()
    assert problem.startswith("mlflow was not told everything: MlflowException: ")
    assert str(plan.dir.tracking / "mlflow.log") in problem
    events = read_events(plan.dir.tensorboard)
    assert len(events.Scalars("loss")) == 4
    assert events.Tensors("run/end/text_summary")


def test_a_tracker_that_is_killed_costs_a_warning_and_no_more(tmp_path: Path) -> None:
    plan = a_plan(tmp_path, {"tensorboard": True})
    tracking = RunTracking(plan)
    tracking.start()
    train(plan, "", 1)
    state = plan.dir.tracking / "tensorboard.json"
    assert wait_until(lambda: FeedState.read(state).positions, timeout_s=WITHIN_S, every_s=0.1)
    tracking._processes["tensorboard"].kill()
    tracking.tell(Finished(report=a_report(plan)))
    (problem,) = tracking.end()
    assert "its process ended with -9" in problem


def test_a_tracker_ends_by_itself_when_its_run_is_killed(tmp_path: Path) -> None:
    plan = a_plan(tmp_path, {"tensorboard": True})
    train(plan, "", 1, 2)
    tracking = RunTracking(plan, last_s=WITHIN_S)
    tracking.start()
    process = tracking._processes["tensorboard"]
    tracking.end(wait=False)  # its standard input is closed, as by the kernel
    assert process.wait(WITHIN_S) == 0
    assert len(read_events(plan.dir.tensorboard).Scalars("loss")) == 2
