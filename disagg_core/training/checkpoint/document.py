"""What a checkpoint says and holds: its documents, the names of its files, and its content in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from disagg_core.errors import CheckpointError

FORMAT = 3
READABLE = (2, FORMAT)
"""Formats that are read: of format 2 the files are the same, its state knows nothing of held-out samples."""
CONFIG_FILE = "config.json"
OPTIMIZER_FILE = "optimizer.safetensors"
RNG_FILE = "rng.safetensors"
STATE_FILE = "trainer.json"
MANIFEST_FILE = "manifest.json"


class DataCursor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which prompt ordinals the weights have seen, as closed ranges, and which were given up (never in both)."""

    trained: list[tuple[int, int]] = []
    quarantined: list[tuple[int, int]] = []


class BestMeasured(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The best that held-out samples have said of a draft: `value` of the figure called `figure`.

    `step` is the trainer's, so that checkpoint has the weights; `since` counts the measurements after it, none better.
    """

    step: int
    figure: str
    value: float
    since: int = 0


class DraftProgress(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is one draft's own: its optimizer steps since the run began, and windows that were left out in its training.

    A window is `skipped` where its loss or gradient is not finite, so many of the last ones `skipped_in_row`.
    `seconds` are those that its steps took. `best` is None before the first measurement on held-out samples.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    skipped_because: str = ""
    loss_first: float | None = None
    loss_last: float | None = None
    seconds: float = 0.0
    best: BestMeasured | None = None


class TrainerState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about a checkpoint that is not a tensor.

    `samples` and `tokens` count what was trained since the run began; `identity` names what must be equal for the
    weights to be continued (run, target, tokenizer, vocabulary map); `total_steps` is the schedule's length, None
    where it is not known. `drafts` has each draft's own progress by its folder, which is empty for an only draft.
    """

    step: int
    samples: int
    tokens: int
    seed: int
    total_steps: int | None
    identity: dict[str, str]
    cursor: DataCursor
    drafts: dict[str, DraftProgress]

    @property
    def best_steps(self) -> set[int]:
        """Steps whose checkpoints have a draft at its best."""
        return {draft.best.step for draft in self.drafts.values() if draft.best is not None}

    def check_identity(self, expected: Mapping[str, str], path: Path) -> None:
        """Raise `CheckpointError` if the checkpoint, which lies at `path`, was made under another identity."""
        if self.identity == dict(expected):
            return
        differing = sorted(
            name for name in {*expected, *self.identity} if expected.get(name) != self.identity.get(name)
        )
        details = ", ".join(f"{n}: expected {expected.get(n)!r}, found {self.identity.get(n)!r}" for n in differing)
        raise CheckpointError(
            f"{path} belongs to another run ({details}); use a new run id, or draft.init_from with an export"
        )


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file as the manifest lists it."""

    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every file of a checkpoint but the manifest itself, by its path in it."""

    format: int
    step: int
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class DraftContent:
    """One draft's part of a checkpoint in memory: whole tensors, or DTensors of which each rank has its rows."""

    weights: Mapping[str, Tensor]
    config: dict[str, Any]
    optimizer: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]


@dataclass(frozen=True)
class CheckpointContent:
    """A checkpoint in memory: `drafts` by folder, the same ones as in `state`."""

    drafts: dict[str, DraftContent]
    state: TrainerState
