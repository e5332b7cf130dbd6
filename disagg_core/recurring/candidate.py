"""A run's draft on its way into service: what is known of it, and of the champion that it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from disagg_core.report.document import GateFigures
from disagg_core.run.known import read_document
from disagg_core.run.plan import RunPlan

INCUMBENT = "incumbent"
"""The result of the champion's evaluation beside the candidate's."""


@dataclass(frozen=True)
class Incumbent:
    """The champion, on this machine, while a candidate is compared with it."""

    number: int
    path: Path


class Candidate(BaseModel):
    """A draft that the gate has decided about; kept in the run's directory while a person is asked.

    `replaces` is the champion in whose place it may be put and no other's: the one that it was judged against, or one
    that was made for another target, against which none can be judged. None: there was none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    replaces: int | None
    gate: GateFigures

    @property
    def label(self) -> str:
        """The version as people write it."""
        return f"v{self.number}"


def decided(candidate: Candidate, decision: str, *reasons: str) -> Candidate:
    """Return a candidate about which something else decided than the gate: a person, or a champion that moved."""
    gate = GateFigures.model_validate(
        {**candidate.gate.model_dump(), "decision": decision, "reasons": [*candidate.gate.reasons, *reasons]}
    )
    return candidate.model_copy(update={"gate": gate})


def read_candidate(plan: RunPlan) -> Candidate | None:
    """Return what the gate has decided about the run's draft; None before it did.

    Raises:
        OtherVersion: it was written by another version.
    """
    return read_document(plan.dir.gate, Candidate) if plan.dir.gate.is_file() else None
