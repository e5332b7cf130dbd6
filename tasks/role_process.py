"""Running one role of a run as a process tree of its own, with its progress shown in the Prefect UI.

The flow run stays a light watcher: the role's GPU tree logs to its own files, dies with the flow run, and is given
time to save its state when the run is cancelled.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast
from uuid import UUID

import httpx
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger

from disagg_core.errors import RoleFailed
from disagg_core.files import write_atomically
from disagg_core.processes.memory_kills import MemoryKills
from disagg_core.processes.shutdown import ROLE_S
from disagg_core.processes.tree import describe_exit, spawn, stop_tree, tail
from disagg_core.run.bottleneck import bottleneck_line
from disagg_core.run.deaths import cause_of_death
from disagg_core.run.outcomes import RoleOutcome, read_outcome, write_failure
from disagg_core.run.phases import share_field
from disagg_core.run.plan import RoleAssignment
from disagg_core.run.progress import ProgressValue, read_progress
from tasks.cancellation import abort_if_over
from tasks.server_away import wait_for_server

_ARTIFACT_INTERVAL_S = 5.0
_LOOK_S = 5.0
"""How often a role's flow run is looked at: was it ended by somebody else?"""

LEAN_MEMORY = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""Environment of the role trees, unless it is set already. Batches of ever new shapes otherwise leave a CPU trainer
with a compiled kernel for each shape: 1,180 MB instead of 920 after 100 steps of the demo."""


def write_assignment(assignment: RoleAssignment, role: str) -> Path:
    """Write what the role process is told, and clear the outcome of an earlier process; return the file."""
    state = assignment.dir.state
    (state / f"{role}-outcome.json").unlink(missing_ok=True)
    document = state / f"{role}-assignment.json"
    write_atomically(document, assignment.model_dump_json(indent=2))
    return document


def run_role_process(
    role: str,
    command: list[str],
    assignment: RoleAssignment,
    log: Path,
    *,
    environment: Mapping[str, str],
    leaves_outcome: bool = True,
) -> RoleOutcome | None:
    """Run `command` to its end while showing the role's progress; return the outcome it leaves, if it leaves one.

    `environment` is added to ours.

    Raises:
        RoleFailed: the process failed or died; class and reason are those it left, else what its exit says.
    """
    logger = get_run_logger()
    logger.info("starting the %s, its output goes to %s", role, log)
    outcome_file = assignment.dir.state / f"{role}-outcome.json"
    progress = _ProgressArtifact(role, assignment)
    started = time.time()
    log_began = log.stat().st_size if log.is_file() else 0
    memory = MemoryKills()

    def every_second() -> None:
        memory.look()
        progress.publish_if_due()

    code = _run_tree(command, log, environment, every_second)
    progress.publish()
    outcome = read_outcome(outcome_file)
    if outcome is None and code == 0 and not leaves_outcome:
        return None
    if outcome is None:
        failure_class, why = cause_of_death(code, log, since=log_began, memory=memory)
        end = f"the {role} ended without reporting an outcome ({why}); the end of {log}:\n{tail(log)}"
        death = RoleFailed(end, failure_class)
        write_failure(outcome_file, started, death, died=True)
        raise death
    if outcome.failure_class == "infrastructure":  # a rank that saw its connection break cannot know why
        failure_class, why = cause_of_death(code, log, since=log_began, memory=memory)
        if failure_class == "out_of_memory":
            write_failure(outcome_file, started, RoleFailed(f"{outcome.message}; {why}", failure_class), died=True)
            outcome = read_outcome(outcome_file) or outcome
    if outcome.state == "failed" or code != 0:
        raise RoleFailed(
            f"the {role} failed: {outcome.message or describe_exit(code)}; its log is {log}",
            outcome.failure_class or "bug",
        )
    logger.info("the %s finished: %s", role, outcome.result)
    return outcome


def run_evaluation_process(command: list[str], log: Path, environment: Mapping[str, str]) -> None:
    """Run the evaluation's `command` to its end; `environment` is added to ours.

    Raises:
        RoleFailed: it failed; the message has the end of its log.
    """
    code = _run_tree(command, log, environment, lambda: None)
    if code != 0:
        raise RoleFailed(f"the evaluation failed ({describe_exit(code)}); the end of {log}:\n{tail(log)}")


def _run_tree(command: list[str], log: Path, environment: Mapping[str, str], every_second: Callable[[], None]) -> int:
    """Run `command` as a process tree and return its exit code; the tree is gone when this returns or raises.

    It returns to a server that can be told of the end.

    Raises:
        Abort: the flow run that this works for is over: nobody would use what the tree still makes.
    """
    abort_if_over()
    process = spawn(command, log, environment={**LEAN_MEMORY, **os.environ, **environment})
    try:
        code = _ended(process, every_second)
    finally:
        with _uninterrupted():
            stop_tree(process, grace_s=ROLE_S)
    wait_for_server()
    return code


def _ended(process: subprocess.Popen[bytes], every_second: Callable[[], None]) -> int:
    looked = time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(1.0)
        every_second()
        if time.monotonic() - looked >= _LOOK_S:
            abort_if_over()
            looked = time.monotonic()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore SIGTERM and SIGINT inside: a second signal must not cut the teardown short."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def artifact_key(text: str) -> str:
    """Return `text` in the letters that an artifact's key may have."""
    return text.replace(".", "-").replace("_", "-")


class _ProgressArtifact:
    """The role's progress file, copied into a Prefect progress artifact at most every five seconds.

    A server that is away, or an artifact that somebody deleted, costs an update of the picture, never the role: a GPU
    tree must not end for it.
    """

    def __init__(self, role: str, assignment: RoleAssignment) -> None:
        self._state, self._spec = assignment.dir.state, assignment.plan.spec
        self._total = assignment.plan.total_prompts if role == "producer" else assignment.plan.total_steps
        self._done_field = "prompts" if role == "producer" else "step"
        self._role = role
        self._key = artifact_key(f"{role}-{assignment.plan.run_id}")
        self._artifact: UUID | None = None
        self._published_at = float("-inf")

    def publish_if_due(self) -> None:
        if time.monotonic() - self._published_at >= _ARTIFACT_INTERVAL_S:
            self.publish()

    def publish(self) -> None:
        state, producer, consumer = (
            read_progress(self._state / f"{role}.json") for role in (self._role, "producer", "consumer")
        )
        advice = bottleneck_line(self._spec, producer, consumer)
        done = state.get(self._done_field)
        share = 100.0 * float(done) / self._total if self._total and isinstance(done, (int, float)) else 0.0
        try:
            if self._artifact is None:
                created = create_progress_artifact(progress=0.0, key=self._key, description=self._role)
                self._artifact = cast(UUID, created)  # a coroutine only inside an event loop
            update_progress_artifact(self._artifact, progress=min(share, 100.0), description=_describe(state, advice))
        except ObjectNotFound:
            get_run_logger().warning("the progress of the %s is shown anew: its artifact was deleted", self._role)
            self._artifact = None
        except httpx.HTTPError as error:
            get_run_logger().warning("the progress of the %s was not shown: %s", self._role, error)
        self._published_at = time.monotonic()


def _describe(state: dict[str, ProgressValue], advice: str | None) -> str:
    """Return a role's progress in one line; of the shares of its phases only what follows from them, the `advice`."""
    shown = {
        name.replace("_", " "): value
        for name, value in state.items()
        if name != "time" and not name.startswith(share_field("")) and value is not None
    }
    parts = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()]
    return " | ".join([*parts, advice] if advice else parts)
