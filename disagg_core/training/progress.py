"""What a trainer counts: of one fit, and of the run since it began."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from disagg_core.ordinals import OrdinalSet
from disagg_core.training.checkpoint import DataCursor, DraftProgress


class TrainOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a fit ended. Counts with `_here` are of this fit, the others of the run since its first attempt.

    `lost` samples of this fit have to be captured again; `quarantined` ones are given up for good, their ordinals in
    closed ranges; `given_up` lists both of this fit, (sample id, reason) each. `skipped` windows had a loss or gradient
    that was not finite, for every draft. `unused` counts references that were published but not trained when the last
    step was reached. Rates are per second from the first window on, over all ranks, and so are waits.
    By a draft's folder in a checkpoint, `drafts` has what is its own, and `parameters` how many it trains.
    """

    reason: str
    steps: int
    samples: int
    tokens: int
    quarantined: int
    quarantined_ordinals: list[tuple[int, int]]
    lost: int
    skipped: int
    unused: int
    steps_here: int
    samples_here: int
    tokens_here: int
    drafts: dict[str, DraftProgress]
    parameters: dict[str, int]
    seconds: float
    data_wait_s: float
    samples_per_second: float
    tokens_per_second: float
    checkpoint: str | None
    given_up: list[tuple[str, str]]


@dataclass
class TrainingProgress:
    """What was done since the run began: what a checkpoint remembers. A step is one that any of the drafts took."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    trained: OrdinalSet = field(default_factory=OrdinalSet)
    quarantined: OrdinalSet = field(default_factory=OrdinalSet)
    drafts: dict[str, DraftProgress] = field(default_factory=dict)

    def cursor(self) -> DataCursor:
        """Return the data cursor."""
        return DataCursor(trained=self.trained.ranges(), quarantined=self.quarantined.ranges())


@dataclass(frozen=True)
class CheckpointPolicy:
    """Where checkpoints go, how often, how many stay, and whose they are."""

    root: Path
    every_steps: int
    keep: int
    seed: int
    identity: Mapping[str, str]
    total_steps: int | None


@dataclass
class FitTally:
    """What one call of `fit` has done."""

    started: float = 0.0
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    wait_s: float = 0.0
    lost: int = 0
    skipped: int = 0
    given_up: list[tuple[str, str]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds since the first window came."""
        return time.monotonic() - self.started if self.started else 0.0
