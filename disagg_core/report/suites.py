"""What was measured by suite: from a result file, as JSON reads it, to figures, and from those to rows of a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from disagg_core.report.document import Estimate, MeasuredFigures

SUITE_HEAD = (
    "suite",
    "questions",
    "accept length (95 %)",
    "over the champion's",
    "tokens/s (95 %)",
    "times plain decoding",
    "kept by drafted position",
)
"""The columns of the table, which `suite_row` fills."""
Kind = Literal["suite", "category", "prompt_length", "position"]
_UNNAMED = "all"
"""The category of questions that have none."""
_PARTS: tuple[tuple[Kind, str], ...] = (
    ("category", "categories"),
    ("prompt_length", "prompt_lengths"),
    ("position", "positions"),
)
_LABELS = {
    "category": "{suite}: {part}",
    "prompt_length": "{suite}: prompts of {part} tokens",
    "position": "{suite}: tokens {part} of the answer",
}


def suite_figures(
    suites: Mapping[str, Mapping[str, Any]], *, plain: str = "plain", incumbent: str = "incumbent"
) -> list[MeasuredFigures]:
    """Return the figures of a result's ``suites``, each suite followed by its parts.

    `plain` and `incumbent` are what the target without a draft and the champion's draft are called in them. A suite
    without categories has none.
    """
    found = []
    for suite, result in suites.items():
        parts: list[tuple[Kind, str | None, Any]] = [("suite", None, result["total"])]
        parts += [
            (kind, part, values)
            for kind, key in _PARTS
            for part, values in result[key].items()
            if kind != "category" or set(result[key]) != {_UNNAMED}
        ]
        for kind, part, values in parts:
            others = [values["against"].get(name, {}) for name in (plain, incumbent)]
            found.append(_figures(suite, kind, part, values, *others))
    return found


def _figures(
    suite: str,
    kind: Kind,
    part: str | None,
    values: Mapping[str, Any],
    undrafted: Mapping[str, Any],
    champion: Mapping[str, Any],
) -> MeasuredFigures:
    return MeasuredFigures(
        suite=suite,
        kind=kind,
        part=part,
        questions=values["questions"],
        accept_length=_estimate(values["accept_length"], values["interval"]),
        per_position=values["per_position"],
        tokens_per_second=_estimate(values["tokens_per_second"], values["tokens_per_second_interval"]),
        speedup=_ratio(undrafted.get("tokens_per_second")),
        gain=_ratio(champion.get("accept_length"), less=1.0),
        speed_gain=_ratio(champion.get("tokens_per_second"), less=1.0),
    )


def _ratio(found: Mapping[str, Any] | None, *, less: float = 0.0) -> Estimate | None:
    if found is None:
        return None
    interval = found["interval"]
    return Estimate(
        value=found["value"] - less, interval=(interval[0] - less, interval[1] - less) if interval is not None else None
    )


def _estimate(value: float | None, interval: Sequence[float] | None) -> Estimate | None:
    return None if value is None else Estimate(value=value, interval=(interval[0], interval[1]) if interval else None)


def suite_rows(figures: Iterable[MeasuredFigures], *, parts: bool = False) -> Iterator[tuple[str, ...]]:
    """Yield a row of the columns `SUITE_HEAD` for each suite and category, and with `parts` for the other parts too."""
    for found in figures:
        if parts or found.kind in ("suite", "category"):
            yield suite_row(found)


def suite_row(found: MeasuredFigures) -> tuple[str, ...]:
    """Return what the columns `SUITE_HEAD` say, empty where nothing is known."""
    return (
        _LABELS[found.kind].format(suite=found.suite, part=found.part) if found.kind != "suite" else found.suite,
        str(found.questions),
        _text(found.accept_length, "{:.2f}"),
        _text(found.gain, "{:+.1%}"),
        _text(found.tokens_per_second, "{:.1f}"),
        _text(found.speedup, "{:.2f}"),
        ", ".join(f"{rate:.2f}" for rate in found.per_position),
    )


def _text(found: Estimate | None, form: str) -> str:
    if found is None:
        return ""
    within = f" ({form.format(found.interval[0])} to {form.format(found.interval[1])})" if found.interval else ""
    return form.format(found.value) + within
