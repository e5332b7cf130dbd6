"""The figures of a run, one list for all that show them: terminal, markdown, Prefect UI, table of runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from disagg_core.failures import POLICIES
from disagg_core.report.comparison import HEAD, comparison_row
from disagg_core.report.document import RunReport
from disagg_core.run.directory import RunDir

BRIEF = ("trained", "steps", "accept length", "seconds")
"""The columns of a table with one line for each run, which `brief_figures` fills."""


@dataclass(frozen=True)
class Figure:
    """One line about a run, as plain text.

    `weight` says how it is to be shown; `brief` has what it contributes to the columns `BRIEF`.
    """

    label: str
    value: str
    weight: Literal["plain", "strong", "alarm"] = "plain"
    brief: Mapping[str, str] = field(default_factory=dict)


def figures_of(report: RunReport) -> list[Figure]:
    """Return the figures of a run in the order in which they are shown."""
    parts = (_progress, _accounting, _training, _time_spent, _evaluation, _drafts, _gate, _end, _places)
    return [figure for part in parts for figure in part(report)]


def brief_figures(report: RunReport) -> list[str]:
    """Return the values of the columns `BRIEF`, empty where the run has none."""
    found = {column: value for figure in figures_of(report) for column, value in figure.brief.items()}
    return [found.get(column, "") for column in BRIEF]


def _progress(report: RunReport) -> Iterator[Figure]:
    p = report.progress
    if p is None:
        return
    yield Figure("attempt", str(p.attempt))
    yield Figure("prompts captured", f"{p.prompts} of {p.total_prompts or '?'}")
    steps = f"{p.steps} of {p.total_steps or '?'} steps"
    brief = {"trained": str(p.trained), "steps": str(p.steps)}
    yield Figure("samples trained", f"{p.trained} in {steps}", brief=brief)
    if p.loss is not None:
        yield Figure("loss", f"{p.loss:.3f} last")
    if p.losses:
        yield Figure("loss", ", ".join(f"{name} {loss:.3f}" for name, loss in p.losses.items()) + " last")


def _accounting(report: RunReport) -> Iterator[Figure]:
    a = report.accounting
    if a is None:
        return
    yield Figure("prompts", f"{a.prompts} = {a.published} published + {a.rejected} rejected")
    if report.rejected_reasons:
        yield Figure("rejected", _counted(report.rejected_reasons))
    unused = f" + {a.unused} unused" if a.unused else ""
    samples = f"{a.published} = {a.trained} trained + {a.quarantined} quarantined{unused}"
    yield Figure("samples", samples, brief={"trained": str(a.trained)})
    if report.quarantined_reasons:
        yield Figure("quarantined", _counted(report.quarantined_reasons))
    yield Figure("left in the store", str(a.store_keys_left))
    for problem in a.problems():
        yield Figure("does not add up", problem, "alarm")


def _counted(reasons: Mapping[str, int]) -> str:
    return "; ".join(f"{count} x {reason}" for reason, count in sorted(reasons.items()))


def _training(report: RunReport) -> Iterator[Figure]:
    t = report.training
    if t is None:
        return
    rate = f"{t.steps} optimizer steps, {t.samples_per_second:.1f} samples/s"
    yield Figure("training", rate, brief={"steps": str(t.steps)})
    if t.loss_first is not None and t.loss_last is not None:
        yield Figure("loss", f"{t.loss_first:.3f} first, {t.loss_last:.3f} last")
    for draft in report.drafts:
        if (best := draft.best) is not None:
            whose = f" of {draft.name}" if len(report.drafts) > 1 else ""
            yield Figure(f"best{whose}", f"{best.figure.replace('_', ' ')} {best.value:.3f} after step {best.step}")


def _time_spent(report: RunReport) -> Iterator[Figure]:
    if report.time_spent is not None:
        yield Figure("bottleneck", report.time_spent.bottleneck)


def _evaluation(report: RunReport) -> Iterator[Figure]:
    e = report.evaluation
    if e is None:
        return
    interval = f" (95% interval {e.interval_after[0]:.2f} to {e.interval_after[1]:.2f})" if e.interval_after else ""
    yield Figure(
        f"accept length, k={e.draft_tokens}",
        f"{e.accept_length_before:.2f} before, {e.accept_length_after:.2f} after training{interval}, "
        f"on {e.prompts} held-out prompts",
        "strong",
        brief={"accept length": f"{e.accept_length_before:.2f} to {e.accept_length_after:.2f}"},
    )
    yield Figure("acceptance by position", ", ".join(f"{rate:.2f}" for rate in e.per_position_after))
    if e.lossless:
        yield Figure("lossless", "yes, the output is that of plain greedy decoding")
    else:
        yield Figure("lossless", "no, the output differs from plain greedy decoding", "alarm")


def _drafts(report: RunReport) -> Iterator[Figure]:
    if len(report.drafts) < 2:
        return
    lengths = {name: found.accept_length_after for name, found in report.evaluations.items()}
    brief = {"accept length": ", ".join(f"{name} {length:.2f}" for name, length in lengths.items())}
    for draft in report.drafts:
        found = dict(zip(HEAD[1:], comparison_row(draft)[1:], strict=True))
        said = "; ".join(f"{what} {value}" for what, value in found.items() if value)
        yield Figure(f"draft {draft.name}", said, "strong", brief=brief if lengths else {})
        if draft.evaluation is not None and not draft.evaluation.lossless:
            yield Figure("lossless", f"no, {draft.name} changes the output", "alarm")


def _gate(report: RunReport) -> Iterator[Figure]:
    g = report.gate
    if g is None:
        return
    against = f"{g.candidate} against {g.incumbent}" if g.incumbent else f"{g.candidate}, without a champion"
    yield Figure("gate", f"{g.decision.replace('_', ' ')}: {against}", "strong")
    for reason in g.reasons:
        yield Figure("because", reason)


def _end(report: RunReport) -> Iterator[Figure]:
    if report.failure:
        yield Figure(f"{report.state} ({report.failure.failure_class})", report.failure.message, "strong")
        yield Figure("way out", POLICIES[report.failure.failure_class].way_out)
    if report.way_on:
        yield Figure("to resume", report.way_on)
    together = f", both roles together {report.roles_overlap_seconds:.0f} s" if report.roles else ""
    yield Figure("time", f"{report.seconds:.0f} s{together}", brief={"seconds": f"{report.seconds:.0f}"})


def _places(report: RunReport) -> Iterator[Figure]:
    run = RunDir(Path(report.run_dir))
    yield Figure("checkpoints", str(run.checkpoints))
    if report.export:
        yield Figure("export", report.export)
    if report.archive:
        yield Figure("archive", report.archive.url)
    yield Figure("report", f"{run.report.with_suffix('.md')} (.html, .json, .png)")
