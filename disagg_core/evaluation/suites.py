"""Suites of questions for a draft: accept length and speed by category, over turns that the model answers itself.

A suite is a file in Spec-Bench's form (``question_id``, ``category``, ``turns``) or in any format of prompts. A
question of several turns is asked turn by turn, each after the model's own answers to those before; answers that the
data has are not read. A record without a ``category`` is of the category ``all``.

Questions of one category are decoded together, a batch at a time, so that a batch's time is its category's. Intervals
are 95 % bootstrap intervals: of the accept length over questions, whose passes resemble each other, and of the speed
over batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from disagg_core.errors import PromptRejected
from disagg_core.evaluation.accept_length import bootstrap_interval
from disagg_core.evaluation.speculative import Generation, Progress
from disagg_core.prompts.bad_records import BadRecord, BadRecords
from disagg_core.prompts.encode import PromptEncoder
from disagg_core.prompts.pinned import PinnedFile
from disagg_core.prompts.pool import Placed, parse_placed
from disagg_core.prompts.record_files import open_records
from disagg_core.prompts.records import questions_of
from disagg_core.prompts.shapes import Conversation, Message, Record
from disagg_core.run_spec.document import DataSection

ALL = "all"
_LENGTHS = (0, 128, 512, 2048)
"""Where the ranges of prompt lengths begin, in tokens."""

Decode = Callable[[Sequence[Sequence[int]]], list[Generation]]
"""Continues a batch of prompts."""


@dataclass(frozen=True)
class Question:
    """One question of a suite: a conversation to be held turn by turn, or a `record` that is one prompt.

    Each of `turns` is what is said before the model answers: the user's messages, with the system's at the start.
    """

    source: str
    category: str
    record: Record
    turns: tuple[tuple[Message, ...], ...] = ()


@dataclass(frozen=True)
class Answer:
    """What the model said to one turn: how long the prompt was, the kept tokens of each pass, the tokens given."""

    question: int
    category: str
    prompt_tokens: int
    accepted: list[int]
    tokens: int


@dataclass(frozen=True)
class Batch:
    """The time that one batch took, and the tokens that it gave."""

    category: str
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Slice:
    """Figures of some answers; those of the accept length are None where there was no pass to measure it by."""

    questions: int
    answers: int
    tokens: int
    target_passes: int
    accept_length: float | None
    interval: tuple[float, float] | None
    per_position: list[float]
    tokens_per_second: float | None = None
    tokens_per_second_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class SuiteResult:
    """A suite as a whole and in parts; `skipped` are questions or turns that found no room, by source."""

    total: Slice
    categories: dict[str, Slice]
    prompt_lengths: dict[str, Slice]
    skipped: dict[str, str] = field(default_factory=dict)


def read_suite(path: Path, data: DataSection, pinned: PinnedFile | None = None) -> tuple[list[Question], PinnedFile]:
    """Return the questions in `path`, whose keys have the names that `data` gives, and the pin of the file.

    Raises:
        PromptError: there are none, or more records cannot be used than `data` allows.
        DataChanged: the file is not what was pinned.
    """
    file = open_records(path, data, pinned)
    bad = BadRecords(data, str(path))
    questions: list[Question] = []
    for index in range(len(file)):
        placed = Placed.of(file, index)
        try:
            questions.append(_question(placed, data))
        except BadRecord as error:
            bad.take(error)
    file.close()
    bad.check(len(file))
    return questions, file.pin


def _question(placed: Placed, data: DataSection) -> Question:
    record = parse_placed(placed, data)
    raw = placed.raw
    category = raw.get("category")
    name = category if isinstance(category, str) and category.strip() else ALL
    if isinstance(raw.get("turns"), list) and isinstance(record, Conversation):
        before = tuple(message for message in record.messages if message["role"] == "system")
        said = [{"role": "user", "content": text} for text in questions_of(raw)]
        turns = tuple((*(before if number == 0 else ()), turn) for number, turn in enumerate(said))
        return Question(placed.source, name, record, turns)
    return Question(placed.source, name, record, _turns_of(record) if isinstance(record, Conversation) else ())


def _turns_of(record: Conversation) -> tuple[tuple[Message, ...], ...]:
    """Return what is said before each answer; of a conversation with calls, whose results are of its own answers, the
    one question before its last answer is asked, with all that stands before."""
    if any(message["role"] == "tool" or message.get("tool_calls") for message in record.messages):
        return ()
    turns: list[tuple[Message, ...]] = []
    asked: list[Message] = []
    for message in record.messages:
        if message["role"] != "assistant":
            asked.append(message)
        elif asked:
            turns.append(tuple(asked))
            asked = []
    return (*turns, tuple(asked)) if asked else tuple(turns)


def run_suite(
    questions: Sequence[Question],
    encoder: PromptEncoder,
    decode: Decode,
    *,
    most_prompt_tokens: int,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> SuiteResult:
    """Ask every question and return the figures; a turn whose prompt has more than `most_prompt_tokens` is skipped."""
    answers: list[Answer] = []
    batches: list[Batch] = []
    skipped: dict[str, str] = {}
    done = 0
    for category, numbers in _batches(questions, batch_size):
        given, seconds = _ask(questions, numbers, encoder, decode, most_prompt_tokens, skipped)
        answers += given
        if given:
            batches.append(Batch(category, sum(answer.tokens for answer in given), seconds))
        done += len(numbers)
        if progress is not None:
            progress(done, len(questions))
    categories = dict.fromkeys(question.category for question in questions)
    return SuiteResult(
        total=_slice(answers, batches),
        categories={
            name: _slice([a for a in answers if a.category == name], [b for b in batches if b.category == name])
            for name in categories
        },
        prompt_lengths=dict(_by_prompt_length(answers)),
        skipped=skipped,
    )


def _batches(questions: Sequence[Question], size: int) -> Iterator[tuple[str, list[int]]]:
    by_category: dict[str, list[int]] = {}
    for number, question in enumerate(questions):
        by_category.setdefault(question.category, []).append(number)
    for category, numbers in by_category.items():
        for start in range(0, len(numbers), size):
            yield category, numbers[start : start + size]


def _ask(
    questions: Sequence[Question],
    numbers: Sequence[int],
    encoder: PromptEncoder,
    decode: Decode,
    most_prompt_tokens: int,
    skipped: dict[str, str],
) -> tuple[list[Answer], float]:
    """Hold the conversations of one batch, turn by turn; return the answers and the seconds that decoding took."""
    answers: list[Answer] = []
    seconds = 0.0
    histories: dict[int, list[Message]] = {number: [] for number in numbers}
    turn = 0
    while histories:
        prompts: dict[int, list[int]] = {}
        for number in histories:
            question = questions[number]
            try:
                ids = _prompt(encoder, question, histories[number], turn)
            except PromptRejected as error:
                skipped[question.source] = str(error)
                continue
            if 0 < len(ids) <= most_prompt_tokens:
                prompts[number] = ids
            else:
                skipped[question.source] = (
                    f"turn {turn + 1} has {len(ids)} tokens, there is room for {most_prompt_tokens}"
                )
        if prompts:
            started = time.perf_counter()
            generations = decode(list(prompts.values()))
            seconds += time.perf_counter() - started
            for (number, ids), generation in zip(prompts.items(), generations, strict=True):
                category = questions[number].category
                answers.append(Answer(number, category, len(ids), generation.accepted, len(generation.tokens)))
                said = encoder.tokenizer.decode(generation.tokens, skip_special_tokens=True)
                histories[number].append({"role": "assistant", "content": said})
        turn += 1
        histories = {number: histories[number] for number in prompts if turn < len(questions[number].turns)}
    return answers, seconds


def _prompt(encoder: PromptEncoder, question: Question, history: list[Message], turn: int) -> list[int]:
    """Return the prompt of a turn; `history`, which gets what is said in it, has the turns before."""
    if not question.turns:
        return encoder.encode_prompt(question.record)
    assert isinstance(question.record, Conversation)
    history.extend(question.turns[turn])
    return encoder.encode_prompt(
        Conversation(list(history), question.record.tools, template_kwargs=question.record.template_kwargs)
    )


def _by_prompt_length(answers: Sequence[Answer]) -> Iterator[tuple[str, Slice]]:
    for start, stop in zip(_LENGTHS, (*_LENGTHS[1:], None), strict=True):
        inside = [a for a in answers if start <= a.prompt_tokens and (stop is None or a.prompt_tokens < stop)]
        if inside:
            yield f"{start}-{stop - 1}" if stop is not None else f"{start}-", _slice(inside, [])


def _slice(answers: Sequence[Answer], batches: Sequence[Batch]) -> Slice:
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
    )


def _speed(batches: Sequence[Batch], *, samples: int = 2000) -> tuple[float | None, tuple[float, float] | None]:
    """Return tokens per second, and its interval where there are several batches to draw from."""
    if not batches:
        return None, None
    tokens, seconds = (np.array([getattr(batch, name) for batch in batches]) for name in ("tokens", "seconds"))
    speed = float(tokens.sum() / seconds.sum())
    if len(batches) < 2:
        return speed, None
    draws = np.random.default_rng(0).integers(0, len(batches), size=(samples, len(batches)))
    low, high = np.quantile(tokens[draws].sum(axis=1) / seconds[draws].sum(axis=1), [0.025, 0.975])
    return speed, (float(low), float(high))


def suite_lines(name: str, suite: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of a table about a suite's result as it stands in a file: itself, its categories, lengths."""
    parts = [(name, suite["total"])]
    parts += [(f"{name}: {category}", part) for category, part in suite["categories"].items()]
    parts += [(f"{name}: prompts of {length} tokens", part) for length, part in suite["prompt_lengths"].items()]
    return [(label, *_cells(part)) for label, part in parts]


def _cells(part: dict[str, Any]) -> tuple[str, ...]:
    length, speed = part["accept_length"], part["tokens_per_second"]
    return (
        str(part["questions"]),
        "-" if length is None else f"{length:.2f}{_between(part['interval'], 2)}",
        "-" if speed is None else f"{speed:.1f}{_between(part['tokens_per_second_interval'], 1)}",
        ", ".join(f"{rate:.2f}" for rate in part["per_position"]),
    )


def _between(interval: Sequence[float] | None, digits: int) -> str:
    return "" if interval is None else f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
