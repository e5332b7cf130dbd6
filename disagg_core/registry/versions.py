"""What the registry keeps of a version, and how its history reads: plain documents, no storage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from disagg_core.errors import BadInput, DraftlineError, FailureClass

_LABEL = re.compile(r"^v?(\d+)$")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataMark(_Record):
    """How far in its data a run came: where the next one goes on.

    `prompts` counts those of the source that were read, `sha256` is of the source up to there, `newest` is the name or
    date of the newest file of a source of many.
    """

    source: str
    prompts: int = Field(ge=0)
    sha256: str | None = None
    newest: str | None = None


class Provenance(_Record):
    """Where a version comes from: all that decides whether another run may continue it, or repeat it."""

    run_id: str
    draft: str = Field("draft", description="Name of the draft within its run.")
    method: str
    target: str = Field(description="The target as the run document names it.")
    target_version: str = Field(description="Fingerprint of the target's revision.")
    tokenizer_version: str
    vocab_map_version: str
    draft_vocab_size: int
    layers: tuple[int, ...] = Field(description="Captured layers of the target.")
    formats: tuple[str, ...] = Field((), description="Serving formats of the exports, the default first.")
    parent: str | None = Field(None, description="What the draft was continued from.")
    data: DataMark | None = None
    accept_length: float | None = None
    archive: str | None = Field(None, description="URL of the run's archive.")
    created: float = Field(description="Seconds since the epoch.")
    draftline: str = Field("", description="Version of draftline.")
    document: dict[str, Any] = Field(default_factory=dict, description="The resolved run document.")


class Version(_Record):
    """A whole version: its number, its provenance, and a hash over all its files."""

    number: int
    provenance: Provenance
    content: str
    bytes: int
    files: int

    @property
    def label(self) -> str:
        """The version as people write it: ``v3``."""
        return f"v{self.number}"


EventKind = Literal["promoted", "rolled_back"]


class Event(_Record):
    """One move of the champion. `token` tells the writer of two equal events apart."""

    number: int
    kind: EventKind
    version: int
    previous: int | None
    at: float
    by: str
    reason: str = ""
    token: str = ""

    def describe(self) -> str:
        """Return the event in words."""
        moved = "promoted" if self.kind == "promoted" else "rolled back to"
        before = f" in place of v{self.previous}" if self.previous is not None else ""
        return f"{self.by} {moved} v{self.version}{before}"


class ChampionMoved(DraftlineError):
    """The champion is not the one that was to be replaced: somebody else has moved it, who is named."""

    failure_class: FailureClass = "bad_input"

    def __init__(self, message: str, winner: Event | None) -> None:
        super().__init__(message)
        self.winner = winner


class UnknownVersion(BadInput):
    """The registry has no such version; what it has is named."""


class VersionExists(BadInput):
    """A run's version is there already, with other weights, and versions do not change."""


class NothingToRollBack(BadInput):
    """There was no champion before the one that is."""


def number_of(label: str) -> int | None:
    """Return the number of a version that is written like ``v3`` or ``3``; None for other words."""
    match = _LABEL.match(label)
    return int(match[1]) if match else None


def champions_of(events: Sequence[Event]) -> list[int]:
    """Return the champions that a rollback goes back through, the present one last.

    A promotion puts a version on top; a rollback takes off what lies above the version that it goes back to.
    """
    stack: list[int] = []
    for event in events:
        if event.kind == "rolled_back" and event.version in stack:
            while stack[-1] != event.version:
                stack.pop()
        else:
            stack.append(event.version)
    return stack
