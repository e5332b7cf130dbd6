"""The drafts of a run side by side: one table for all that show it."""

from __future__ import annotations

from disagg_core.report.document import DraftFigures, EvaluationFigures, RunReport

HEAD = ("draft", "parameters", "loss", "accept length (95 %)", "acceptance by position", "tokens/s", "training s/step")


def comparison_of(report: RunReport) -> list[tuple[str, ...]]:
    """Return a row of the columns `HEAD` for each draft of `report`; none where there is nothing to compare."""
    return [comparison_row(draft) for draft in report.drafts] if len(report.drafts) > 1 else []


def comparison_row(draft: DraftFigures) -> tuple[str, ...]:
    """Return what the columns `HEAD` say of a draft, empty where nothing is known."""
    name = draft.title if draft.name == draft.method else f"{draft.name} ({draft.title})"
    loss = "" if draft.loss_first is None else f"{draft.loss_first:.3f} to {draft.loss_last:.3f}"
    return (
        name,
        f"{draft.parameters:,}",
        loss + (f", {draft.skipped} windows skipped" if draft.skipped else ""),
        *_measured(draft.evaluation),
        f"{draft.seconds / draft.steps:.3f}" if draft.steps else "",
    )


def _measured(found: EvaluationFigures | None) -> tuple[str, str, str]:
    if found is None:
        return "", "", ""
    interval = found.interval_after
    within = f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    lossy = "" if found.lossless else ", not lossless"
    return (
        f"{found.accept_length_after:.2f}{within}{lossy}",
        ", ".join(f"{rate:.2f}" for rate in found.per_position_after),
        "" if found.tokens_per_second is None else f"{found.tokens_per_second:.0f}",
    )
