"""Whole runs from the command line: real Prefect server, pools and workers, real store, both roles."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from disagg_core.drafts.export import import_draft
from disagg_core.report.archive import verify_archive
from disagg_core.report.records import REPORT_FILES
from disagg_core.run.outcomes import read_outcome
from tests.kit.runs import Draftline, Ours, report_of
from tests.kit.waiting import eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]

STEPS = 6  # 44 prompts in windows of 8: five whole ones and a partial one


@pytest.mark.usefixtures("lived_in")
def test_a_run_trains_on_every_prompt_and_leaves_nothing_behind(
    home: Path, draftline: Draftline, tiny: str, ours: Ours
) -> None:
    run = draftline("run", tiny)
    output, _ = run.communicate(timeout=400)
    assert run.returncode == 0, output

    report = report_of(home)
    assert report.state == "completed"
    accounting = report.accounting
    assert accounting is not None
    assert (accounting.prompts, accounting.published, accounting.trained) == (44, 44, 44)
    assert (accounting.rejected, accounting.quarantined, accounting.store_keys_left) == (0, 0, 0)
    assert report.training is not None
    assert report.training.steps == STEPS

    assert {role: run.work_pool for role, run in report.roles.items()} == {
        "producer": "gpu-rollout",
        "consumer": "gpu-train",
    }
    assert report.roles["producer"].flow_run_id != report.roles["consumer"].flow_run_id
    assert report.roles_overlap_seconds > 0

    assert report.evaluation is not None
    assert report.evaluation.lossless
    assert report.evaluation.prompts == 4

    assert report.archive is not None
    assert verify_archive(report.archive.url) > 10
    archived = json.loads((Path(report.archive.url) / "manifest.json").read_text())["files"]
    assert {"evaluation/before.json", "evaluation/after.json", *REPORT_FILES} <= set(archived)
    (events,) = (name for name in archived if name.startswith("tensorboard/"))
    curve = EventAccumulator(str(Path(report.archive.url) / events)).Reload().Scalars("loss")
    assert [point.step for point in curve] == list(range(1, STEPS + 1))
    _, config, state = import_draft(Path(report.archive.url) / "export")
    assert config.draft_vocab_size == 512
    assert state["lm_head.weight"].shape[0] == 512
    assert "44 = 44 published + 0 rejected" in output
    assert (home / "runs" / report.run_id / "report.png").read_bytes().startswith(b"\x89PNG")
    assert ours() == []


@pytest.mark.slow
@pytest.mark.timeout(3300)
def test_a_run_that_is_repeated_from_its_archive_gives_the_same_draft(
    home: Path, draftline: Draftline, tiny: str
) -> None:
    """Bit for bit, by the archive alone: the run's directory is gone."""
    run = draftline("run", tiny, "--set", "rollout.workers=1", "--set", "evaluation.at_end=false")
    output, _ = run.communicate(timeout=1500)
    assert run.returncode == 0, output
    first = report_of(home)
    assert first.archive is not None
    shutil.rmtree(first.run_dir)

    again = draftline("run", first.archive.url)
    output, _ = again.communicate(timeout=1500)
    assert again.returncode == 0, output
    second = report_of(home)
    assert second.run_id != first.run_id
    assert second.archive is not None
    name = f"checkpoints/step-{STEPS}/draft.safetensors"
    one, other = (load_file(Path(report.archive.url) / name) for report in (first, second) if report.archive)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[tensor], other[tensor]) for tensor in one)

    shown = draftline("diff", first.archive.url, second.archive.url, "--json")
    output, _ = shown.communicate(timeout=300)
    found = json.loads(output)
    assert (found["document"], found["data"], found["identity"]) == ([], [], [])
    assert found["curves"]
    losses = [point for point in found["curves"] if point["figure"] == "loss"]
    assert all(point["one"] == point["other"] for point in losses)


@pytest.mark.slow
def test_a_consumer_that_is_killed_continues_from_its_checkpoint_in_the_next_attempt(
    home: Path, draftline: Draftline, tiny: str, ours: Ours
) -> None:
    """`draftline up`, then a run whose trainer is killed after its first checkpoint: nothing is lost or doubled."""
    up = draftline("up")
    output, _ = up.communicate(timeout=200)
    assert up.returncode == 0, output
    platform = json.loads((home / "platform.json").read_text())
    api = f"http://127.0.0.1:{platform['port']}/api"

    run = draftline("run", tiny, "--set", "rollout.high_watermark_refs=8", "--set", "run.name=killed")
    trainer = wait_for_trainer(home, ours, "checkpoints/step-2/manifest.json")
    trainer.send_signal(signal.SIGKILL)
    output, _ = run.communicate(timeout=400)
    assert run.returncode == 0, output

    report = report_of(home)
    assert [attempt.failure_class for attempt in report.attempts] == ["preempted", None]
    assert report.accounting is not None
    assert (report.accounting.published, report.accounting.trained) == (44, 44)
    children = httpx.post(f"{api}/flow_runs/filter", json={"flows": {"name": {"any_": ["train-consumer"]}}}).json()
    assert sorted(child["state_type"] for child in children) == ["COMPLETED", "FAILED"]
    assert all(child["parent_task_run_id"] for child in children)
    assert ours() != []

    down = draftline("down")
    down.communicate(timeout=90)
    assert ours() == []


def wait_for_trainer(home: Path, ours: Ours, sign: str) -> psutil.Process:
    """Wait until the run has `sign` in its directory; return its training process."""

    def trainer() -> psutil.Process | None:
        if not any(home.glob(f"runs/*/{sign}")):
            return None
        return next((one for one in ours() if "disagg_core.roles.consumer" in " ".join(one.cmdline())), None)

    return eventually(trainer, f"a trainer with {sign}", within_s=240)


@pytest.mark.slow
def test_ctrl_c_cancels_the_run_and_stops_everything(home: Path, draftline: Draftline, tiny: str, ours: Ours) -> None:
    run = draftline("run", tiny, "--set", "data.limit=2000")
    wait_for_trainer(home, ours, "checkpoints/step-2/manifest.json")
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 130, output
    assert "interrupted: cancelling the run" in output
    assert ours() == []

    for role in ("producer", "consumer"):
        (outcome,) = (read_outcome(path) for path in home.glob(f"runs/*/attempts/1/state/{role}-outcome.json"))
        assert outcome is not None
        assert outcome.failure_class == "preempted", "it was to end before its store does"
    report = report_of(home)
    assert report.state == "cancelled"
    assert report.progress is not None
    assert report.progress.trained >= 16
    assert f"run {report.run_id}: cancelled" in output
    assert report.archive is not None, "what it left is archived all the same"
    assert verify_archive(report.archive.url) > 10
    status, _ = draftline("status").communicate(timeout=60)
    assert re.search(rf"{report.run_id} +│ cancelled +│ {report.progress.trained} ", status)


@pytest.mark.slow
def test_a_cancelled_run_goes_on_from_its_checkpoint_when_it_is_tried_again(
    home: Path, draftline: Draftline, tiny: str, ours: Ours
) -> None:
    draftline("up").communicate(timeout=200)
    run = draftline("run", tiny, "--set", "data.limit=200")
    wait_for_trainer(home, ours, "checkpoints/step-2/manifest.json")
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=120)
    cut_off = report_of(home)
    assert cut_off.state == "cancelled"

    api = f"http://127.0.0.1:{json.loads((home / 'platform.json').read_text())['port']}/api"
    flow_run = f"{api}/flow_runs/{cut_off.flow_run_id}"
    retry = {"type": "SCHEDULED", "name": "AwaitingRetry"}  # what the button in the UI asks for
    httpx.post(f"{flow_run}/set_state", json={"state": retry, "force": True}).raise_for_status()

    def state() -> str:
        return str(httpx.get(flow_run).json()["state_type"])

    eventually(
        lambda: state() == "COMPLETED",
        state,
        within_s=300,
        every_s=0.5,
        alive=lambda: state() in ("SCHEDULED", "PENDING", "RUNNING"),
    )

    report = report_of(home)
    assert (report.state, [attempt.attempt for attempt in report.attempts]) == ("completed", [2])
    assert report.accounting is not None
    assert (report.accounting.published, report.accounting.trained) == (200, 200)
    outcome = read_outcome(home / "runs" / report.run_id / "attempts" / "2" / "state" / "consumer-outcome.json")
    assert outcome is not None
    assert outcome.result["samples_here"] < 200


@pytest.mark.slow
def test_a_run_whose_process_is_killed_leaves_a_report(home: Path, draftline: Draftline, tiny: str, ours: Ours) -> None:
    run = draftline("run", tiny, "--set", "data.limit=2000")
    wait_for_trainer(home, ours, "checkpoints/step-2/manifest.json")
    (document,) = home.glob("runs/*/run.json")
    suffix = document.parent.name.rpartition("-")[2]
    of_the_run = (p for p in ours() if p.environ().get("PREFECT__FLOW_RUN_ID", "").endswith(suffix))
    min(of_the_run, key=psutil.Process.create_time).kill()
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 1, output

    report = report_of(home)
    assert report.state == "crashed"
    assert report.progress is not None
    assert report.progress.trained >= 16
    assert ours() == []


@pytest.mark.slow
def test_a_run_whose_server_is_killed_does_not_keep_the_next_one_waiting(
    home: Path, draftline: Draftline, tiny: str, ours: Ours
) -> None:
    run = draftline("run", tiny, "--set", "data.limit=2000")
    wait_for_trainer(home, ours, "checkpoints/step-2/manifest.json")
    server = json.loads((home / "platform.json").read_text())["members"]["server"]["pid"]
    psutil.Process(server).kill()
    output, _ = run.communicate(timeout=180)
    assert run.returncode == 1
    assert "the Prefect server has ended" in output
    assert report_of(home).state == "crashed"
    assert ours() == []

    output, _ = draftline("up").communicate(timeout=200)
    assert re.search(r"marked \d+ flow runs as crashed", output)
    api = f"http://127.0.0.1:{json.loads((home / 'platform.json').read_text())['port']}/api"
    running = {"flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}}
    assert httpx.post(f"{api}/flow_runs/filter", json=running).json() == []
    assert [limit["active_slots"] for limit in httpx.post(f"{api}/v2/concurrency_limits/filter", json={}).json()] == [0]


@pytest.mark.slow
def test_a_store_process_that_dies_ends_the_attempt_by_its_name(
    home: Path, draftline: Draftline, tiny: str, ours: Ours
) -> None:
    run = draftline("run", tiny, "--set", "rollout.high_watermark_refs=8")
    wait_for_trainer(home, ours, "checkpoints/step-2/manifest.json")
    (master,) = (process for process in ours() if process.name() == "mooncake_master")
    master.kill()
    output, _ = run.communicate(timeout=400)
    assert run.returncode == 0, output

    report = report_of(home)
    assert [attempt.failure_class for attempt in report.attempts] == ["store_lost", None]
    assert re.search(
        rf"mooncake_master \(pid {master.pid}\) ended with killed by SIGKILL; the end of .*mooncake-master\.log",
        report.attempts[0].reason,
    )
    assert report.accounting is not None
    assert (report.accounting.published, report.accounting.trained) == (44, 44)
    assert ours() == []


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.max_step=3", "training.max_step: unknown key; did you mean max_steps"),
        pytest.param("data.prompts=./nothing.jsonl", "nothing.jsonl", marks=pytest.mark.slow),
        pytest.param("target.model=./nothing", "no such directory", marks=pytest.mark.slow),
        pytest.param("store.capacity=1MiB", "store.capacity: expected at least", marks=pytest.mark.slow),
        pytest.param("target.aux_layers=[0, 1, 9]", "target.aux_layers", marks=pytest.mark.slow),
        pytest.param(
            "rollout.high_watermark_refs=7",
            "high_watermark_refs: expected at least one optimizer window",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_input_is_one_message_before_anything_starts(
    home: Path, draftline: Draftline, tiny: str, override: str, complaint: str
) -> None:
    run = draftline("run", tiny, "--set", override)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 2
    assert complaint in output
    assert "Traceback" not in output
    assert not (home / "platform.json").exists()
