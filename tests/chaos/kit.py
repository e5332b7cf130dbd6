"""One run on a chaos platform: started, disturbed in mid-training, followed to its end, measured.

A scenario reads as a story::

    run = start("The trainer is killed")
    run.train_until(step=12)
    run.disturb(run.process("consumer").kill)
    run.detected_by_flow_run("consumer")
    run.completes(attempts=["preempted", "finished"])
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil

from disagg_core.ordinals import OrdinalSet
from disagg_core.processes.retry import wait_until
from disagg_core.processes.tree import tail
from disagg_core.report.document import RunReport
from disagg_core.run.directory import RunDir
from disagg_core.run.metrics import read_metrics
from disagg_core.run.plan import run_id_of
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.training.checkpoint import newest_complete, read_state
from tests.chaos.leftovers import Footprint
from tests.chaos.platform import FINAL, ChaosPlatform
from tests.chaos.record import STANDS_STILL_S, Record
from tests.kit.processes import alive, command_of, environment_of

DOCUMENT = Path(__file__).with_name("chaos.yaml")
TRAINING_S = 400.0
"""From the start of a run to the step that a scenario waits for."""
END_S = 600.0
"""From the disturbance to the end of a run."""
DETECTION_S = 300.0
POLL_S = 0.05
GONE_S = 60.0
"""The process of a flow run ends after the server has heard how; on a busy machine many seconds after."""
CANCELLED_S = 60.0
"""From the wish to cancel a run until it is cancelled and nothing of it is left."""

MARKS = {
    "producer": "-m disagg_core.roles.producer",
    "consumer": "-m disagg_core.roles.consumer",
    "owner": "disagg_core.store.owner",
    "master": "mooncake_master",
    "evaluation": "-m disagg_core.roles.evaluation",
    "server": "sglang.launch_server",
}
"""What is in the command line of each process of a run."""


class ChaosRun:
    """A run of `chaos.yaml`, and what is measured of it."""

    def __init__(self, platform: ChaosPlatform, title: str, write: Callable[[Record], None], *settings: str) -> None:
        self.platform = platform
        self.title = title
        self._write = write
        self._began = time.time()
        self._disturbed_at: float | None = None
        self._detected: tuple[float, str] | None = None
        self.footprint = Footprint(platform)
        self.spec: RunSpec = load_spec(DOCUMENT, settings)
        self.id = ""

    # --- starting and following it ------------------------------------------------------------------------------

    def submit(self, *, delay_s: float = 0.0) -> None:
        """Ask the server for the run, as its UI does; it begins `delay_s` seconds later."""
        deployment = self.platform.get("deployments/name/online-disagg-training/local")
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + delay_s))
        state = {"type": "SCHEDULED", "state_details": {"scheduled_time": at}}
        created = self.platform.post(
            f"deployments/{deployment['id']}/create_flow_run",
            parameters={"spec": self.spec.model_dump(mode="json")},
            state=state,
            tags=["draftline"],
        )
        self.id = created["id"]

    @property
    def dir(self) -> RunDir:
        """The run's directory."""
        return RunDir.of(self.platform.home / "runs", run_id_of(self.spec, self.id))

    def state(self) -> str:
        """Return the state of the run, "AWAY" while the server does not answer."""
        try:
            return str(self.platform.get(f"flow_runs/{self.id}")["state_type"])
        except httpx.HTTPError:
            return "AWAY"

    def await_(self, condition: Callable[[], Any], what: str, within_s: float, *, ended_too: bool = False) -> Any:
        """Wait until `condition` holds and return what it gave; a run that has ended before fails the test.

        Unless `ended_too`: what is waited for may be the end of the run.
        """
        deadline, looked = time.monotonic() + within_s, time.monotonic()
        while not (found := condition()):
            assert time.monotonic() < deadline, self._told(f"{what}: not within {within_s:g} s")
            if time.monotonic() - looked > 2.0:
                looked = time.monotonic()
                over = not ended_too and self.state() in FINAL and not condition()
                assert not over, self._told(f"{what}: the run ended before")
            time.sleep(POLL_S)
        return found

    def steps(self) -> list[tuple[float, int]]:
        """Return time and number of every optimizer step so far, of all attempts."""
        records = read_metrics(self.dir.metrics / "train.jsonl")
        return [(float(record["time"]), int(record["step"])) for record in records]  # type: ignore[arg-type]

    def train_until(self, step: int, *, within_s: float = TRAINING_S) -> None:
        """Wait until so many steps are trained; take note of what the run holds by then."""
        self.await_(lambda: any(number >= step for _, number in self.steps()), f"step {step}", within_s)
        self.footprint.look()

    # --- its processes ------------------------------------------------------------------------------------------

    def find(self, role: str, *, rank: int | None = None) -> psutil.Process | None:
        """Return the live process of a role, or of one rank of the trainer; None if there is none."""
        for process in alive():
            environment = environment_of(process)
            if environment.get("DRAFTLINE_HOME") != str(self.platform.home) or MARKS[role] not in command_of(process):
                continue
            if rank is None or environment.get("RANK") == str(rank):
                return process
        return None

    def process(self, role: str, *, rank: int | None = None) -> psutil.Process:
        """Return the live process of a role, which must be there."""
        found = self.find(role, rank=rank)
        assert found is not None, self._told(f"there is no {role}")
        return found

    def parent(self) -> psutil.Process:
        """Return the process of the parent flow run."""
        return self._flow_process(self.id)

    def watcher(self, role: str) -> psutil.Process:
        """Return the process of the flow run in which a role runs."""
        (child,) = (found for found in self.children(role) if found["state_type"] == "RUNNING")
        return self._flow_process(child["id"])

    def _flow_process(self, flow_run_id: str) -> psutil.Process:
        ours = (p for p in self.platform.processes() if environment_of(p).get("PREFECT__FLOW_RUN_ID") == flow_run_id)
        return min(ours, key=psutil.Process.create_time)

    def children(self, role: str) -> list[dict[str, Any]]:
        """Return the flow runs of a role, as the server has them."""
        tags = {"all_": [f"run:{self.dir.run_id}", f"role:{role}"]}
        return list(self.platform.post("flow_runs/filter", flow_runs={"tags": tags}))

    # --- the disturbance ----------------------------------------------------------------------------------------

    def disturb(self, act: Callable[[], object]) -> None:
        """Do it, and count the seconds from here."""
        self._disturbed_at = time.time()
        act()

    def wait_out(self, seconds: float) -> None:
        """Let so many seconds pass since the disturbance began: it is to last so long."""
        assert self._disturbed_at is not None
        time.sleep(max(0.0, self._disturbed_at + seconds - time.time()))

    def detects(self, condition: Callable[[], Any], sign: str) -> Any:
        """Wait for a sign that the product took note, and keep how long that took."""
        found = self.await_(condition, f"a sign of detection ({sign})", DETECTION_S, ended_too=True)
        assert self._disturbed_at is not None
        self._detected = (time.time() - self._disturbed_at, sign)
        return found

    def detects_end_of_a_role(self) -> None:
        """Wait until the server knows that a flow run of a role has ended badly: the first that took note."""

        def ended() -> str | None:
            ends = (role for role in ("producer", "consumer") for child in self.children(role) if _ended_badly(child))
            return next(ends, None)

        self.detects(ended, "a role's flow run ended")

    def detects_in_log(self, *words: str) -> None:
        """Wait until a log of the run's roles has some of these words."""

        def said() -> str | None:
            logs = self.log("producer") + self.log("consumer")
            return next((text for text in words if text in logs), None)

        self.detects(said, "a role's log says so")

    def detects_that_the_channel_is_away(self) -> None:
        """Wait until a role has missed a heartbeat, or an operation."""
        self.detects_in_log("did not get through", "the channel is away")

    def log(self, name: str) -> str:
        """Return what the process `name` has logged in all attempts."""
        return "".join(path.read_text(errors="replace") for path in self.dir.root.glob(f"attempts/*/logs/{name}*.log"))

    def cancel_in(self, phase: Callable[[], Any], what: str, hold: Callable[[], psutil.Process]) -> None:
        """Cancel the run, as the UI does, while it is in a phase; what works in it is held until the server knows."""
        assert wait_until(phase, timeout_s=TRAINING_S, every_s=0.001), self._told(f"the run was never in: {what}")
        held = hold()
        held.suspend()
        self.footprint.look()
        try:
            self.disturb(lambda: self.platform.post(f"flow_runs/{self.id}/set_state", state={"type": "CANCELLING"}))
        finally:
            held.resume()

    def is_cancelled(self) -> None:
        """Wait until the run is cancelled and nothing of it is left."""
        self.detects(lambda: self.state() == "CANCELLED" and not self.left(), "cancelled, and nothing left")
        assert self._detected is not None
        assert self._detected[0] < CANCELLED_S, self._told("it took too long")

    def await_cleared(self) -> None:
        """Wait until the worker of a crashed run has done its hooks: there is a report, and nothing is left of it.

        One that is tried again before would be crashed once more by its worker's last word on the dead process.
        """
        cleared = wait_until(lambda: self.dir.report.is_file() and not self.left(), timeout_s=DETECTION_S, every_s=0.5)
        assert cleared, self._told("its worker has not cleared it away")

    def retry(self) -> None:
        """Press the button Retry on the run's page in the UI."""
        awaiting = {"type": "SCHEDULED", "name": "AwaitingRetry"}
        self.platform.post(f"flow_runs/{self.id}/set_state", state=awaiting, force=True)

    # --- the end ------------------------------------------------------------------------------------------------

    def ended(self, within_s: float = END_S) -> str:
        """Wait for the end of the run and return its state."""
        assert wait_until(lambda: self.state() in FINAL, timeout_s=within_s, every_s=0.5), self._told("no end")
        return self.state()

    def completes(
        self, attempts: Sequence[str] = ("finished",), *, restarts: int = 0, within_s: float = END_S
    ) -> RunReport:
        """Wait until the run is completed with these attempts, check that nothing is lost, doubled or left behind.

        `attempts` names the failure class of each attempt of the last process of the run, and "finished".
        """
        state = self.ended(within_s)
        assert state == "COMPLETED", self._told(f"ended as {state}")
        report = RunReport.model_validate_json(self.dir.report.read_bytes())
        found = [attempt.failure_class or "finished" for attempt in report.attempts]
        assert found == list(attempts), self._told(f"expected attempts {list(attempts)}")
        assert _restarts(report) == restarts, self._told(f"expected {restarts} restarts")
        self._check_samples(report)
        wait_until(lambda: not self.left(), timeout_s=GONE_S, every_s=0.5)
        left = self.left()
        assert left == [], self._told(f"left: {left}")
        self._write(self._record(report, found, left))
        return report

    def left(self) -> list[str]:
        """Return what is there of the run now: kind and name of each."""
        left = [f"{kind}: {item}" for kind, items in self.footprint.left().items() for item in items]
        return left + [f"slot: {name}" for name in self.platform.taken_slots()]

    def _check_samples(self, report: RunReport) -> None:
        accounting = report.accounting
        assert accounting is not None, self._told("no accounting")
        assert accounting.problems() == [], self._told("the numbers do not add up")
        assert accounting.trained + accounting.rejected + accounting.quarantined == accounting.prompts
        assert accounting.prompts == self.spec.data.limit
        newest = newest_complete(self.dir.checkpoints)
        assert newest is not None
        trained = read_state(newest)
        names = OrdinalSet(trained.cursor.trained)
        assert len(names) == trained.samples == accounting.trained, self._told("a sample was trained twice")
        assert not accounting.rejected + accounting.quarantined, self._told("a sample came to nothing")

    def longest_pause(self) -> tuple[float, float]:
        """Return the longest pause between two steps, one of them after the disturbance: seconds, and when it ended."""
        assert self._disturbed_at is not None
        times = [at for at, _ in self.steps()]
        pauses = [(after - before, after) for before, after in pairwise(times) if after > self._disturbed_at]
        return max(pauses, default=(0.0, self._disturbed_at))

    def _record(self, report: RunReport, attempts: list[str], left: list[str]) -> Record:
        assert report.accounting is not None
        assert self._disturbed_at is not None
        still_s, ended_at = self.longest_pause()
        return Record(
            group="",
            place=0,
            title=self.title,
            end=report.state,
            attempts=attempts,
            restarts=_restarts(report),
            detected_s=self._detected[0] if self._detected else None,
            detected_by=self._detected[1] if self._detected else "",
            still_s=still_s,
            training_again_s=ended_at - self._disturbed_at if still_s > STANDS_STILL_S else None,
            prompts=report.accounting.prompts,
            trained=report.accounting.trained,
            rejected=report.accounting.rejected,
            quarantined=report.accounting.quarantined,
            left=left,
            seconds=time.time() - self._began,
            load=round(os.getloadavg()[1]),
        )

    def _told(self, what: str) -> str:
        """Return `what`, with all that helps to see why."""
        parts = [what, f"state: {self.state()}", f"left: {self.left() if self.id else []}"]
        with contextlib.suppress(OSError):
            parts.append(self.dir.report.read_text())
        logs = sorted(self.dir.root.glob("attempts/*/logs/*.log")) if self.id else []
        parts += [f"--- {path}\n{tail(path, 12)}" for path in logs if "mooncake" not in path.name]
        return "\n".join(parts)


def _ended_badly(child: dict[str, Any]) -> bool:
    return child["state_type"] in FINAL and child["state_type"] != "COMPLETED"


def _restarts(report: RunReport) -> int:
    producer = report.roles.get("producer")
    return producer.restarts if producer else 0
