"""What a role's watcher does when the Prefect server is away."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.exceptions import ObjectNotFound

from disagg_core.run.plan import RoleAssignment, make_plan
from disagg_core.run.progress import ProgressFile
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.target.facts import read_target_facts
from tasks import role_process

pytestmark = pytest.mark.unit

SPEC = Path(__file__).resolve().parents[3] / "infra" / "runs" / "qwen3-8b-eagle3.yaml"


class Server:
    """Takes artifacts, or is away."""

    def __init__(self) -> None:
        self.away = True
        self.deleted = False
        self.shown: list[float] = []
        self.told: list[str] = []

    def create(self, **_: object) -> UUID:
        if self.away:
            raise httpx.ConnectError("connection refused")
        self.deleted = False
        return uuid4()

    def update(self, _artifact: UUID, *, progress: float, description: str) -> None:
        if self.away:
            raise httpx.ConnectError("connection refused")
        if self.deleted:
            raise ObjectNotFound(LookupError("artifact"))
        self.shown.append(progress)
        self.told.append(description)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(role_process, "create_progress_artifact", server.create)
    monkeypatch.setattr(role_process, "update_progress_artifact", server.update)
    monkeypatch.setattr(role_process, "get_run_logger", lambda: logging.getLogger("test"))
    return server


@pytest.fixture
def assignment(tmp_path: Path) -> RoleAssignment:
    spec = load_spec(SPEC)
    plan = make_plan(spec, read_target_facts(spec.target), run_id="run.1", root=tmp_path, total_prompts=100)
    endpoints = StoreEndpoints(master_address="a:1", metrics_address="a:2")
    return RoleAssignment(plan=plan, attempt=1, store=endpoints)


@pytest.fixture
def artifact(assignment: RoleAssignment) -> role_process._ProgressArtifact:
    ProgressFile(assignment.dir.state / "producer.json").update(prompts=25)
    return role_process._ProgressArtifact("producer", assignment)


def test_a_server_that_is_away_costs_an_update_and_not_the_role(
    server: Server, artifact: role_process._ProgressArtifact
) -> None:
    artifact.publish()
    server.away = False
    artifact.publish()
    server.away = True
    artifact.publish()
    assert server.shown == [25.0]


def test_a_progress_artifact_that_was_deleted_in_the_ui_is_made_anew(
    server: Server, artifact: role_process._ProgressArtifact
) -> None:
    server.away = False
    artifact.publish()
    server.deleted = True
    artifact.publish()
    assert server.shown == [25.0]
    artifact.publish()
    assert server.shown == [25.0, 25.0]


def test_the_artifact_of_either_side_says_what_holds_the_run_up_and_not_each_share(
    server: Server, artifact: role_process._ProgressArtifact
) -> None:
    server.away = False
    shares = {"share_refs": 0.4, "share_forward": 0.3}
    ProgressFile(artifact._state / "consumer.json").update(phase="training", step=3, **shares)
    artifact.publish()
    (told,) = server.told
    assert told.startswith("prompts 25 | inference-bound: training waits 40% for features")
    assert "share" not in told


def test_a_further_node_of_the_consumer_which_writes_no_progress_has_an_artifact_all_the_same(
    server: Server, assignment: RoleAssignment
) -> None:
    server.away = False
    role_process._ProgressArtifact("consumer-node1", assignment).publish()
    assert server.shown == [0.0]


def test_a_role_runs_with_the_gpus_that_are_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    log = tmp_path / "log"

    code = role_process._run_tree(
        [sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"],
        log,
        {"CUDA_VISIBLE_DEVICES": "2,3"},
        lambda: None,
    )

    assert (code, log.read_text()) == (0, "2,3\n")
