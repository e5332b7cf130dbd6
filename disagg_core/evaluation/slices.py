"""Figures of a suite, as a whole and in parts: by category, by length of prompt, by place in the answer.

Intervals are 95 % bootstrap intervals: of the accept length over questions, whose passes resemble each other, and of
the speed over batches. What is measured beside others on the same questions and batches is compared pair by pair: of a
ratio it is pairs that are drawn (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13), so that what
makes a question hard or a minute slow for both does not widen its interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from disagg_core.evaluation.accept_length import bootstrap_interval
from disagg_core.evaluation.questions import ALL
from disagg_core.evaluation.turns import Decoded

_LENGTHS = (0, 128, 512, 2048)
"""Where the ranges of prompt lengths begin, in tokens."""
_PLACES = (0, 32, 128, 512)
"""Where the ranges of places in an answer begin, in tokens after the prompt."""
_SAMPLES = 2000

Interval = tuple[float, float]


@dataclass(frozen=True)
class Answer:
    """What the model said to one turn: how long the prompt was, the kept tokens of each pass, the tokens given."""

    question: int
    category: str
    prompt_tokens: int
    accepted: list[int]
    tokens: int
    in_order: bool = True


@dataclass(frozen=True)
class Batch:
    """The time that one batch took for its questions of a category, and the tokens that it gave them."""

    category: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """What one decoder did with a suite, beside others that had the same batches.

    `skipped` are questions or turns that found no room, by source.
    """

    questions: int
    answers: list[Answer] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ratio:
    """A rate divided by another's on the same pairs; no interval where there are not at least two of them."""

    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Against:
    """Accept length and speed, each divided by another decoder's."""

    accept_length: Ratio | None
    tokens_per_second: Ratio | None


@dataclass(frozen=True)
class Slice:
    """Figures of some answers; those of the accept length are None where there was no pass to measure it by."""

    questions: int
    answers: int
    tokens: int
    target_passes: int
    accept_length: float | None
    interval: Interval | None
    per_position: list[float]
    tokens_per_second: float | None = None
    tokens_per_second_interval: Interval | None = None
    against: dict[str, Against] = field(default_factory=dict)


@dataclass(frozen=True)
class SuiteResult:
    """A suite as a whole and in parts; `by_question` has tokens and passes of each question, in order.

    `positions` say where in the answer a pass began; a server does not tell.
    """

    total: Slice
    categories: dict[str, Slice]
    prompt_lengths: dict[str, Slice]
    positions: dict[str, Slice]
    by_question: list[tuple[int, int]]
    skipped: dict[str, str] = field(default_factory=dict)


def measured_prompts(prompts: Sequence[Sequence[int]], decoded: Decoded) -> Measured:
    """Return what was decoded of `prompts` as of a suite without categories, each prompt a question."""
    answers = [
        Answer(number, ALL, len(prompt), found.accepted, len(found.tokens), found.in_order)
        for number, (prompt, found) in enumerate(zip(prompts, decoded.generations, strict=True))
    ]
    batches = [
        Batch(ALL, sum(answers[number].tokens for number in batch), seconds)
        for batch, seconds in zip(decoded.batches, decoded.seconds, strict=True)
    ]
    return Measured(len(prompts), answers, batches)


def results_of(measured: Mapping[str, Measured], references: Sequence[str]) -> dict[str, SuiteResult]:
    """Return the figures of each decoder by name, against each of `references` among them that is another one."""
    return {
        name: _result(own, {other: measured[other] for other in references if other in measured and other != name})
        for name, own in measured.items()
    }


def _result(own: Measured, others: Mapping[str, Measured]) -> SuiteResult:
    def of(category: str | None) -> Slice:
        part = _part(own, category)
        against = {name: _against(part, _part(other, category)) for name, other in others.items()}
        return _slice(part.answers, part.batches, against)

    return SuiteResult(
        total=of(None),
        categories={category: of(category) for category in dict.fromkeys(batch.category for batch in own.batches)},
        prompt_lengths=dict(_by_prompt_length(own.answers)),
        positions=dict(_by_place(own.answers)),
        by_question=[(tokens, passes) for tokens, passes in _by_question(own).tolist()],
        skipped=own.skipped,
    )


def _part(whole: Measured, category: str | None) -> Measured:
    """Return the answers and batches of one category, or all."""
    if category is None:
        return whole
    answers = [answer for answer in whole.answers if answer.category == category]
    return Measured(whole.questions, answers, [batch for batch in whole.batches if batch.category == category])


def _by_question(measured: Measured) -> NDArray[np.int64]:
    """Return tokens and passes of each question of the suite, [questions, 2]; 0 where it was not asked."""
    sums = np.zeros((measured.questions, 2), dtype=np.int64)
    for answer in measured.answers:
        sums[answer.question] += (sum(answer.accepted) + len(answer.accepted), len(answer.accepted))
    return sums


def _against(own: Measured, other: Measured) -> Against:
    times = [np.array([(b.tokens, b.seconds) for b in part.batches]).reshape(-1, 2) for part in (own, other)]
    return Against(ratio_of_rates(_by_question(own), _by_question(other)), ratio_of_rates(*times))


def ratio_of_rates(own: NDArray[Any], other: NDArray[Any]) -> Ratio | None:
    """Return by how much the rate of `own` is that of `other`, each [pairs, 2] with numerators and denominators.

    A rate is a ratio of sums. Pairs in which one of the two has nothing to divide by say nothing and are left out;
    None if no pair is left, or the other's rate is 0.
    """
    pairs = np.concatenate((own, other), axis=1).astype(np.float64)
    pairs = pairs[(pairs[:, 1] > 0) & (pairs[:, 3] > 0)]
    if not pairs[:, 2].any():
        return None
    value = float(_ratio(pairs.sum(axis=0)))
    if len(pairs) < 2:
        return Ratio(value, None)
    drawn = pairs[_draws(len(pairs))].sum(axis=1)
    drawn = drawn[drawn[:, 2] > 0]
    low, high = np.quantile(_ratio(drawn), [0.025, 0.975])
    return Ratio(value, (float(low), float(high)))


def _ratio(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = (sums[..., 0] / sums[..., 1]) / (sums[..., 2] / sums[..., 3])
    return found


def _draws(count: int) -> NDArray[np.int64]:
    """Return numbers of pairs drawn with replacement, [samples, count]."""
    return np.random.default_rng(0).integers(0, count, size=(_SAMPLES, count))


def _by_prompt_length(answers: Sequence[Answer]) -> Iterator[tuple[str, Slice]]:
    for label, start, stop in _ranges(_LENGTHS):
        inside = [answer for answer in answers if start <= answer.prompt_tokens < stop]
        if inside:
            yield label, _slice(inside, [])


def _by_place(answers: Sequence[Answer]) -> Iterator[tuple[str, Slice]]:
    """Yield the passes by where they began; the pass over the prompt gives the token at 0."""
    for label, start, stop in _ranges(_PLACES):
        inside = []
        for answer in answers:
            began = 1 + np.cumsum([0, *(count + 1 for count in answer.accepted[:-1])])
            kept = [count for count, at in zip(answer.accepted, began.tolist(), strict=False) if start <= at < stop]
            if kept and answer.in_order:
                given = sum(kept) + len(kept)
                inside.append(Answer(answer.question, answer.category, answer.prompt_tokens, kept, given))
        if inside:
            yield label, _slice(inside, [])


def _ranges(starts: Sequence[int]) -> Iterator[tuple[str, float, float]]:
    for start, stop in zip(starts, (*starts[1:], None), strict=True):
        yield (f"{start}-", start, float("inf")) if stop is None else (f"{start}-{stop - 1}", start, stop)


def _slice(answers: Sequence[Answer], batches: Sequence[Batch], against: Mapping[str, Against] | None = None) -> Slice:
    by_question: dict[int, list[int]] = {}
    for answer in answers:
        by_question.setdefault(answer.question, []).extend(answer.accepted)
    accepted = list(by_question.values())
    counts = [count for passes in accepted for count in passes]
    speed, speed_interval = _speed(batches)
    reached = np.bincount(counts, minlength=1) if counts else np.zeros(1)
    return Slice(
        questions=len(by_question),
        answers=len(answers),
        tokens=sum(answer.tokens for answer in answers),
        target_passes=len(counts),
        accept_length=1.0 + sum(counts) / len(counts) if counts else None,
        interval=bootstrap_interval(accepted) if counts else None,
        per_position=(reached[::-1].cumsum()[::-1][1:] / len(counts)).tolist() if counts else [],
        tokens_per_second=speed,
        tokens_per_second_interval=speed_interval,
        against=dict(against or {}),
    )


def _speed(batches: Sequence[Batch]) -> tuple[float | None, Interval | None]:
    """Return tokens per second, and its interval where there are several batches to draw from."""
    timed = np.array([(batch.tokens, batch.seconds) for batch in batches if batch.seconds > 0], dtype=np.float64)
    if not len(timed):
        return None, None
    tokens, seconds = timed.sum(axis=0)
    if len(timed) < 2:
        return float(tokens / seconds), None
    drawn = timed[_draws(len(timed))].sum(axis=1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    return float(tokens / seconds), (float(low), float(high))
