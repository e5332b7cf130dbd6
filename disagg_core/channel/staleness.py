"""Staleness: whether a reference may still be trained on. Off unless asked for.

The *target axis* is strict: a reference captured by another target, tokenizer, vocabulary map, strategy or schema can
never be right, so the first one ends the reading. The *draft axis* is a matter of degree: a reference captured for a
draft more than `max_draft_lag` versions old is dropped, counted, and handed to `on_drop`, which frees its sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from disagg_core.contracts import IDENTITY_FIELDS, SCHEMA_VERSION, RunIdentity, SampleRef
from disagg_core.errors import BadInput, IdentityMismatch


@dataclass
class Staleness:
    """What a reader accepts. `draft_version` returns the version of the draft that is being trained now."""

    identity: RunIdentity | None = None
    max_draft_lag: int | None = None
    draft_version: Callable[[], int] | None = None
    on_drop: Callable[[SampleRef], None] | None = None
    refused: int = 0
    dropped: list[SampleRef] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.max_draft_lag is not None and self.draft_version is None:
            raise BadInput("max_draft_lag has no effect without draft_version, which tells the current draft's version")

    def refuse(self, ref: SampleRef) -> None:
        """Raise `IdentityMismatch`, naming the field, unless the reference fits the target axis."""
        if ref.schema_version != SCHEMA_VERSION:
            self._mismatch(ref, "schema_version", SCHEMA_VERSION, ref.schema_version)
        if self.identity is None:
            return
        for name in IDENTITY_FIELDS:
            expected, found = getattr(self.identity, name), getattr(ref, name)
            if expected != found:
                self._mismatch(ref, name, expected, found)

    def _mismatch(self, ref: SampleRef, name: str, expected: object, found: object) -> None:
        self.refused += 1
        raise IdentityMismatch(
            f"reference {ref.sample_id} has {name} {found!r}, expected {expected!r}: producer and consumer do not run "
            "with the same target, tokenizer, vocabulary map and code; start both from one run document"
        )

    def drop(self, ref: SampleRef) -> bool:
        """Return whether the reference is too old to train on; if so it is counted and handed on to be freed."""
        if self.max_draft_lag is None or self.draft_version is None:
            return False
        if self.draft_version() - ref.draft_weight_version <= self.max_draft_lag:
            return False
        if self.on_drop is not None:
            self.on_drop(ref)
        self.dropped.append(ref)
        return True
