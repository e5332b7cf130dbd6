"""What a tracker is told of a run: one interface, whatever the tracker writes to.

The run writes files (``metrics/train.jsonl`` of each draft, and its events); a process beside it reads them and tells
an observer. An observer may therefore be slow, raise, or hang: it is told again what it could not take, and what it
makes of it costs the run nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict

from disagg_core.report.document import EvaluationFigures, GateFigures, RunReport

Step: TypeAlias = Mapping[str, Any]
"""One draft's figures of an optimizer step, as they stand in its ``train.jsonl``: `step`, `time`, and numbers."""
NO_FIGURES = {"step", "time"}
"""Fields of a line that say when it was written."""


class TrackedRun(BaseModel):
    """A run as a tracker names and describes it."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    name: str
    root: Path
    """The run's directory."""
    document: dict[str, Any]
    """The resolved run document, which holds no secrets."""
    identity: dict[str, str]
    """What the document does not say: versions of the target, the tokenizer and this software."""
    drafts: dict[str, Path]
    """The ``train.jsonl`` of each draft, by its folder; the folder of an only one is empty."""
    heldout: dict[str, Path] = {}
    """The ``heldout.jsonl`` of each draft, likewise; figures of a line are told as ``heldout/<name>``."""


class Evaluated(BaseModel):
    """A draft was measured; `draft` is its folder."""

    event: Literal["evaluated"] = "evaluated"
    draft: str
    figures: EvaluationFigures


class Decided(BaseModel):
    """The gate, or a person, has decided about the draft; `source` is where its version lies in the registry."""

    event: Literal["decided"] = "decided"
    gate: GateFigures
    source: str


class Finished(BaseModel):
    """The run has ended, well or not."""

    event: Literal["finished"] = "finished"
    report: RunReport


Event: TypeAlias = Evaluated | Decided | Finished


class RunObserver(Protocol):
    """Writes what a run does to a tracker. This protocol is the whole of that surface.

    `started` comes first, also where an earlier process has told the tracker of the run: an observer goes on with what
    it finds there. What is told may be told again after a failure: an observer writes it over, or twice. Each method
    may raise what its tracker's client raises.
    """

    def started(self, run: TrackedRun) -> None:
        """Make the run known, with its document and its identity."""

    def steps(self, draft: str, steps: Sequence[Step]) -> None:
        """Take steps of a draft, in the order in which they were taken; an attempt may take one again."""

    def evaluated(self, draft: str, figures: EvaluationFigures) -> None:
        """Take what was measured of a draft."""

    def decided(self, gate: GateFigures, source: str) -> None:
        """Take the decision about the run's draft; see `Decided`."""

    def finished(self, report: RunReport) -> None:
        """Take how the run ended."""

    def close(self) -> None:
        """Write out what was told so far. The run may go on in another process, so this is not its end."""


def scalars_of(step: Step) -> Iterator[tuple[str, float]]:
    """Yield the figures of a step by name; those of a list as ``name/0``, ``name/1``, ..."""
    for name, value in step.items():
        if name in NO_FIGURES or value is None:
            continue
        if isinstance(value, list):
            yield from ((f"{name}/{index}", float(element)) for index, element in enumerate(value))
        elif isinstance(value, (int, float)):
            yield name, float(value)


def evaluation_scalars(figures: EvaluationFigures) -> Iterator[tuple[str, float]]:
    """Yield what was measured of a draft by name."""
    yield "accept_length_before", figures.accept_length_before
    yield "accept_length", figures.accept_length_after
    yield "lossless", float(figures.lossless)
    if figures.tokens_per_second is not None:
        yield "tokens_per_second", figures.tokens_per_second
    for position, rate in enumerate(figures.per_position_after):
        yield f"acceptance/{position}", rate


def named(draft: str, figure: str) -> str:
    """Return the name of a draft's figure among those of several."""
    return f"{draft}/{figure}" if draft else figure
