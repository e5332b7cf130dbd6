"""What the two sides of a run spend their time on: the phases, their names for people, and their recent shares.

A trainer is in exactly one phase at any moment, so that its phases add up to the time that passed. A producer has
several threads: the phases of its rollout workers add up to the workers' time together, and what other threads do
beside them, storing and publishing, is listed apart.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Literal

from disagg_core.run.metrics import MetricValue
from disagg_core.run.progress import ProgressValue, tells_pace

TrainingPhase = Literal[
    "refs",
    "features",
    "collate",
    "h2d",
    "forward",
    "backward",
    "reduce",
    "optimizer",
    "ack",
    "save",
    "evaluate",
    "other",
]

TRAINING_PHASES: dict[str, str] = {
    "refs": "waiting for references",
    "features": "waiting for features (store get)",
    "collate": "packing or padding into batches",
    "h2d": "copy to the device",
    "forward": "forward",
    "backward": "backward",
    "reduce": "sums over ranks",
    "optimizer": "clipping and optimizer",
    "ack": "acknowledge and free",
    "save": "checkpoint",
    "evaluate": "held-out evaluation",
    "other": "everything else",
}
"""The trainer's phases, in the order in which a step goes through them."""

PRODUCER_PHASES: dict[str, str] = {
    "space": "waiting for space (watermarks)",
    "generate": "generate",
    "prefill": "prefill",
    "d2h": "copy from the device",
    "put": "put, or waiting for a putter",
    "other": "everything else",
}
"""The phases of the rollout workers, all of them together."""

PRODUCER_BESIDE = {"put_beside": "put, in threads of its own", "publish": "publish"}
"""What the producer does beside its workers."""

DATA_WAIT: tuple[TrainingPhase, ...] = ("refs", "features")
"""The phases in which training has nothing to do."""

RECENT_S = 120.0
"""Shares are those of about the last so many seconds."""


def seconds_of(record: Mapping[str, MetricValue], phases: Iterable[str]) -> dict[str, float]:
    """Return the seconds of each of the `phases` that a record of a metrics file says, 0 where it says none."""
    found = {phase: record.get(f"{phase}_s") for phase in phases}
    return {phase: float(value) if isinstance(value, (int, float)) else 0.0 for phase, value in found.items()}


def fields_of(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return the `seconds` of phases as fields of a metrics file."""
    return {f"{phase}_s": round(value, 6) for phase, value in seconds.items()}


class RecentShares:
    """The shares of phases over about the last `window_s` seconds; what is older is forgotten."""

    def __init__(self, window_s: float = RECENT_S) -> None:
        self._window_s = window_s
        self._records: deque[tuple[float, int, Mapping[str, float]]] = deque()
        self._seconds = 0.0

    def add(self, phases: Mapping[str, float], *, samples: int) -> None:
        """Take the seconds of each phase of one step or interval, in which `samples` were done."""
        seconds = sum(phases.values())
        self._records.append((seconds, samples, phases))
        self._seconds += seconds
        while len(self._records) > 1 and self._seconds - self._records[0][0] >= self._window_s:
            self._seconds -= self._records.popleft()[0]

    def fields(self) -> dict[str, ProgressValue]:
        """Return the shares as fields of a progress file, 0 to 1; none before anything was added."""
        shares = shares_of(self.sums())
        return {share_field(phase): round(share, 4) for phase, share in shares.items()}

    def sums(self) -> dict[str, float]:
        """Return the seconds of each phase."""
        sums: dict[str, float] = {}
        for _, _, phases in self._records:
            for phase, seconds in phases.items():
                sums[phase] = sums.get(phase, 0.0) + seconds
        return sums

    @property
    def mean_s(self) -> float | None:
        """Mean seconds of a step or interval; None while they are too few to tell, and are not a whole window yet."""
        known = self._seconds >= self._window_s or tells_pace(len(self._records), self._seconds)
        return self._seconds / len(self._records) if known else None

    def rate_without(self, idle: Iterable[str], parallel: int = 1) -> float | None:
        """Return the samples a second that would be done if the `idle` phases took no time.

        `parallel` workers spend the seconds together. None where nothing is known yet.
        """
        sums = self.sums()
        busy = (sum(sums.values()) - sum(sums.get(phase, 0.0) for phase in idle)) / parallel
        samples = sum(count for _, count, _ in self._records)
        return samples / busy if samples and busy > 0 else None


def shares_of(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return each phase's share of all the `seconds`; one of less than none has none."""
    known = {phase: max(0.0, value) for phase, value in seconds.items()}
    total = sum(known.values())
    return {phase: value / total for phase, value in known.items()} if total > 0 else {}


def share_field(phase: str) -> str:
    """Return what the share of `phase` is called in a progress file."""
    return f"share_{phase}"
