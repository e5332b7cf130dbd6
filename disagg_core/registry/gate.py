"""The gate: may a draft take the champion's place? A pure function of paired measurements and the document's bounds.

Candidate and incumbent decode the same prompts, so what is compared is the pair, and what is drawn is the prompt: the
interval of a gain is the percentile bootstrap interval of the ratio of two accept lengths over the same drawn prompts
(Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13). Suites are drawn each for itself, so that every
draw has as many prompts of a suite as there are. An accept length is tokens per pass of the target: a ratio of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from disagg_core.errors import BadInput
from disagg_core.report.document import Criterion, GateFigures, SuiteFigures
from disagg_core.run_spec.document import GateSection

ALL = "all"
"""The name of all prompts together among the suites."""
_FEWEST = 5
"""Prompts that an interval needs: draws from fewer are so alike that it is narrow whatever the truth is."""
_DRAWS = 4000
_DRAWS_AT_ONCE = 250
_Sums = NDArray[np.float64]  # [..., 4]: candidate's tokens and passes, incumbent's tokens and passes
Interval = tuple[float, float]


@dataclass(frozen=True)
class Decoded:
    """What a draft did on one prompt: tokens that the target's passes yielded, and how many passes there were."""

    tokens: int
    passes: int


@dataclass(frozen=True)
class PairedPrompt:
    """One prompt, decoded with the candidate and, where there is a champion, with it too."""

    suite: str
    prompt: str
    candidate: Decoded
    incumbent: Decoded | None = None


def decide(
    gate: GateSection,
    prompts: Sequence[PairedPrompt],
    *,
    candidate: str,
    incumbent: str | None,
    lossless: bool,
    seed: int = 0,
) -> GateFigures:
    """Return whether `candidate` is promoted, rejected, or needs a person's approval, with reasons and figures.

    Without an incumbent there is nothing to gain or to lose: only the bounds on the draft itself are looked at. A
    draft that changes the target's output is rejected whatever else it does. Equal arguments give equal figures.

    Args:
        gate: the bounds.
        prompts: the measurements; those in which one of the two had no pass at all say nothing and are left out.
        candidate: what the draft is called, for people.
        incumbent: what the champion is called; None where there is none.
        lossless: whether decoding with the candidate gave what plain decoding gives.
        seed: of the draws.

    Raises:
        BadInput: no prompt can be compared, pairs lack the incumbent, or a suite of the gate was not measured.
    """
    suites = _suites(gate, prompts, paired=incumbent is not None)
    rng = np.random.default_rng(seed)
    drawn = {name: _draws(rows, rng) for name, rows in suites.items()}
    everything = np.concatenate(list(suites.values()))
    figures = [_figures(ALL, everything, sum(drawn.values(), np.zeros((_DRAWS, 4))), gate.confidence, incumbent)]
    figures += [_figures(name, rows, drawn[name], gate.confidence, incumbent) for name, rows in suites.items()]
    criteria = list(_criteria(gate, figures, lossless))
    decision, reasons = _decision(gate, criteria, incumbent)
    return GateFigures(
        decision=decision,
        reasons=reasons,
        criteria=criteria,
        suites=figures,
        candidate=candidate,
        incumbent=incumbent,
        confidence=gate.confidence,
        seed=seed,
    )


def _suites(gate: GateSection, prompts: Sequence[PairedPrompt], *, paired: bool) -> dict[str, _Sums]:
    """Return what was measured of each suite that counts, [prompts, 4], by name in order."""
    alone = [prompt.prompt for prompt in prompts if paired and prompt.incumbent is None]
    if alone:
        raise BadInput(
            f"gate: expected every prompt to be decoded by both drafts, found {len(alone)} with one: {alone[:3]}"
        )
    measured = sorted({prompt.suite for prompt in prompts})
    unknown = sorted(set(gate.suites) - set(measured))
    if unknown:
        raise BadInput(f"gate.suites: expected suites that were measured ({', '.join(measured)}), found {unknown}")
    suites = {}
    for name in gate.suites or measured:
        rows = [_row(prompt, paired) for prompt in prompts if prompt.suite == name]
        kept = [row for row in rows if row[1] and (row[3] or not paired)]
        if not kept:
            raise BadInput(f"gate: expected a prompt of suite {name} that can be compared, found none of {len(rows)}")
        suites[name] = np.array(kept, dtype=np.float64)
    if not suites:
        raise BadInput("gate: expected prompts to compare the drafts on, found none")
    return suites


def _row(prompt: PairedPrompt, paired: bool) -> tuple[int, int, int, int]:
    other = prompt.incumbent if paired and prompt.incumbent is not None else Decoded(0, 0)
    return prompt.candidate.tokens, prompt.candidate.passes, other.tokens, other.passes


def _draws(rows: _Sums, rng: np.random.Generator) -> _Sums:
    """Return the sums over `_DRAWS` draws of as many prompts as there are, with replacement; [draws, 4]."""
    count = len(rows)
    sums = np.empty((_DRAWS, 4))
    for start in range(0, _DRAWS, _DRAWS_AT_ONCE):
        times = rng.multinomial(count, np.full(count, 1 / count), size=_DRAWS_AT_ONCE)
        sums[start : start + _DRAWS_AT_ONCE] = times @ rows
    return sums


def _figures(name: str, rows: _Sums, drawn: _Sums, level: float, incumbent: str | None) -> SuiteFigures:
    total = rows.sum(axis=0)
    own, drawn_own = total[0] / total[1], drawn[:, 0] / drawn[:, 1]
    other = gain = gain_interval = None
    if incumbent is not None:
        other = float(total[2] / total[3])
        gain = float(own / other - 1)
        gain_interval = _interval(drawn_own / (drawn[:, 2] / drawn[:, 3]) - 1, level)
    return SuiteFigures(
        suite=name,
        prompts=len(rows),
        candidate=float(own),
        candidate_interval=_interval(drawn_own, level),
        incumbent=other,
        gain=gain,
        gain_interval=gain_interval,
    )


def _interval(values: NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _criteria(gate: GateSection, figures: Sequence[SuiteFigures], lossless: bool) -> Iterable[Criterion]:
    yield Criterion(
        name="lossless",
        suite=None,
        bound=1.0,
        estimate=float(lossless),
        interval=None,
        verdict="kept" if lossless else "missed",
    )
    everything, *suites = figures
    if gate.min_accept_length is not None:
        yield _criterion("min_accept_length", everything, gate.min_accept_length)
    if gate.min_gain is not None and everything.gain is not None:
        yield _criterion("min_gain", everything, gate.min_gain)
    if gate.max_regression is not None:
        bound = -gate.max_regression
        yield from (_criterion("max_regression", suite, bound) for suite in suites if suite.gain is not None)


def _criterion(
    name: Literal["min_accept_length", "min_gain", "max_regression"], figures: SuiteFigures, bound: float
) -> Criterion:
    """Return how the estimate of `figures` and its interval lie to the `bound`."""
    estimate, interval = figures.candidate, figures.candidate_interval
    if name != "min_accept_length":
        assert figures.gain is not None
        assert figures.gain_interval is not None
        estimate, interval = figures.gain, figures.gain_interval
    verdict: Literal["kept", "uncertain", "missed"] = "uncertain"
    if estimate < bound:
        verdict = "missed"
    elif interval[0] >= bound and figures.prompts >= _FEWEST:
        verdict = "kept"
    suite = None if figures.suite == ALL else figures.suite
    return Criterion(name=name, suite=suite, bound=bound, estimate=estimate, interval=interval, verdict=verdict)


def _decision(
    gate: GateSection, criteria: Sequence[Criterion], incumbent: str | None
) -> tuple[Literal["promoted", "rejected", "needs_approval"], list[str]]:
    missed = [_reason(criterion) for criterion in criteria if criterion.verdict == "missed"]
    if missed:
        return "rejected", missed
    uncertain = [_reason(criterion) for criterion in criteria if criterion.verdict == "uncertain"]
    if uncertain and gate.approval == "never":
        return "rejected", uncertain
    if uncertain:
        return "needs_approval", uncertain
    kept = [_reason(criterion) for criterion in criteria]
    if incumbent is None:
        kept.append("there is no champion yet")
    if gate.approval == "always":
        return "needs_approval", [*kept, "gate.approval: always"]
    return "promoted", kept


def _reason(criterion: Criterion) -> str:
    """Return a criterion in words."""
    if criterion.name == "lossless":
        return "the output is the target's own" if criterion.estimate else "the output is not the target's own"
    share = criterion.name != "min_accept_length"
    where = f" on {criterion.suite}" if criterion.suite is not None else ""
    found = _number(criterion.estimate, share)
    if criterion.interval is not None:
        found += f" ({_number(criterion.interval[0], share)} to {_number(criterion.interval[1], share)})"
    what = "gain" if share else "accept length"
    return f"{what}{where} {found}: gate.{criterion.name} {_number(criterion.bound, share)} is {criterion.verdict}"


def _number(value: float, share: bool) -> str:
    return f"{value:+.1%}" if share else f"{value:.3f}"
