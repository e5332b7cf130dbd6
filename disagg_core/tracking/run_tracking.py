"""The trackers of a run, as the run's own process sees them: started, told of events, ended in time.

Each has a process of its own, which reads the metrics from the run's files. Nothing is awaited of it while the run goes
on, and at the end for a bounded time; what it could not do is said once, as a warning.
"""

from __future__ import annotations

import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from disagg_core.files import LineFile, write_atomically
from disagg_core.run.plan import RunPlan
from disagg_core.tracking.feed import LAST_S, FeedState
from disagg_core.tracking.observer import Event, TrackedRun
from disagg_core.tracking.trackers import TrackerName, TrackerRequest, trackers_of

_MARGIN_S = 5.0
"""How much longer than its process says a tracker is waited for."""


class RunTracking:
    """The trackers of one run. No method raises for what a tracker, or the disk, does."""

    def __init__(self, plan: RunPlan, *, last_s: float = LAST_S) -> None:
        """`last_s` is how long a tracker may take for what is left at the end."""
        self._plan = plan
        self._last_s = last_s
        self._place = plan.dir.tracking
        self._processes: dict[TrackerName, subprocess.Popen[bytes]] = {}
        self._problems: list[str] = []

    def start(self) -> None:
        """Start a process for each tracker that the document asks for."""
        for tracker in trackers_of(self._plan.spec.tracking):
            try:
                self._processes[tracker] = self._started(tracker)
            except OSError as error:
                self._problems.append(f"{tracker}: its process was not started: {error}")

    def tell(self, event: Event) -> None:
        """Write an event for the trackers."""
        if not self._processes:
            return
        try:
            file = LineFile(self._events)
            file.append(event.model_dump_json().encode())
            file.close()
        except OSError as error:
            self._problems.append(f"{event.event} was not written: {error}")

    def end(self, *, wait: bool = True) -> list[str]:
        """Let every tracker take what is left, and return what is wrong with each; empty where nothing is.

        Without `wait` they do so by themselves after this process: it has no time for them.
        """
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()
        deadline = time.monotonic() + self._last_s + _MARGIN_S
        if wait:
            for tracker, process in self._processes.items():
                self._problems += self._ended(tracker, process, deadline)
        self._processes = {}
        problems, self._problems = self._problems, []
        return problems

    @property
    def _events(self) -> Path:
        return self._place / "events.jsonl"

    def _started(self, tracker: TrackerName) -> subprocess.Popen[bytes]:
        request = TrackerRequest(
            tracker=tracker,
            section=self._plan.spec.tracking,
            run=tracked(self._plan),
            events=self._events,
            state=self._place / f"{tracker}.json",
            last_s=self._last_s,
        )
        path = self._place / f"{tracker}-request.json"
        write_atomically(path, request.model_dump_json(indent=2))
        with (self._place / f"{tracker}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "disagg_core.tracking.main", str(path)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )

    def _ended(self, tracker: TrackerName, process: subprocess.Popen[bytes], deadline: float) -> list[str]:
        try:
            process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        problem = FeedState.read(self._place / f"{tracker}.json").problem
        if problem is None and process.returncode == 0:
            return []
        why = problem or f"its process ended with {process.returncode}"
        return [
            f"{tracker} was not told everything: {why}; its log is {self._place / tracker}.log, and the run's figures "
            f"are in {self._plan.root}"
        ]


def tracked(plan: RunPlan) -> TrackedRun:
    """Return a run as trackers describe it."""
    return TrackedRun(
        run_id=plan.run_id,
        name=plan.spec.run.name,
        root=plan.root,
        document=plan.spec.model_dump(mode="json"),
        identity={
            "version": metadata.version("draftline"),
            "directory": str(plan.root),
            "target": plan.spec.target.model,
            "target_version": plan.target.version,
            "tokenizer_version": plan.tokenizer_version,
            "methods": ", ".join(draft.section.method for draft in plan.drafts),
        },
        drafts={draft.folder: draft.dir.train_metrics for draft in plan.drafts},
        heldout={draft.folder: draft.dir.heldout_metrics for draft in plan.drafts},
    )
