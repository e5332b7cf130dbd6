"""Suites of questions for a draft, asked turn by turn over answers that the model gives itself.

Questions are decoded a batch at a time, by several decoders in turn (see `disagg_core.evaluation.turns`); each holds
conversations of its own. Where a batch is of one category its time is the category's; where it is of several, as on a
server that is to be kept busy, its time is shared out by how long each answer took.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from disagg_core.errors import PromptRejected
from disagg_core.evaluation.questions import Question
from disagg_core.evaluation.slices import Answer, Batch, Measured
from disagg_core.evaluation.speculative import Decode, Generation, Progress
from disagg_core.evaluation.turns import in_turn
from disagg_core.prompts.encode import PromptEncoder
from disagg_core.prompts.shapes import Conversation, Message


def run_suite(
    questions: Sequence[Question],
    encoder: PromptEncoder,
    decoders: Mapping[str, Decode],
    *,
    most_prompt_tokens: int,
    batch_size: int = 16,
    by_category: bool = True,
    progress: Progress | None = None,
) -> dict[str, Measured]:
    """Ask every question with each decoder and return what came of it, by the decoder's name.

    A turn whose prompt has more than `most_prompt_tokens` is skipped. `by_category` keeps the categories apart, so that
    batches may be smaller than `batch_size`. `progress` is called with the questions that all decoders have answered.
    """
    found = {name: Measured(len(questions)) for name in decoders}
    done = 0
    for turn, numbers in enumerate(_batches(questions, batch_size, by_category)):
        for name in in_turn(list(decoders), turn):
            _Round(questions, numbers, encoder, most_prompt_tokens).run(decoders[name], found[name])
        done += len(numbers)
        if progress is not None:
            progress(done, len(questions))
    return found


def _batches(questions: Sequence[Question], size: int, by_category: bool) -> Iterator[list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for number, question in enumerate(questions):
        groups[question.category if by_category else ""].append(number)
    for numbers in groups.values():
        for start in range(0, len(numbers), size):
            yield numbers[start : start + size]


class _Round:
    """The conversations of one batch with one decoder."""

    def __init__(
        self, questions: Sequence[Question], numbers: Sequence[int], encoder: PromptEncoder, most_prompt_tokens: int
    ) -> None:
        self._questions = questions
        self._encoder = encoder
        self._most = most_prompt_tokens
        self._histories: dict[int, list[Message]] = {number: [] for number in numbers}

    def run(self, decode: Decode, measured: Measured) -> None:
        """Hold the conversations, turn by turn, and add answers and times to `measured`."""
        tokens: dict[str, int] = dict.fromkeys((self._questions[number].category for number in self._histories), 0)
        seconds = dict.fromkeys(tokens, 0.0)
        turn = 0
        while self._histories:
            prompts = self._prompts(turn, measured.skipped)
            if prompts:
                started = time.perf_counter()
                generations = decode(list(prompts.values()))
                shares = _shares(generations, time.perf_counter() - started)
                for (number, ids), found, share in zip(prompts.items(), generations, shares, strict=True):
                    category = self._questions[number].category
                    given = len(found.tokens)
                    measured.answers.append(Answer(number, category, len(ids), found.accepted, given, found.in_order))
                    tokens[category] += given
                    seconds[category] += share
                    said = self._encoder.tokenizer.decode(found.tokens, skip_special_tokens=True)
                    self._histories[number].append({"role": "assistant", "content": said})
            turn += 1
            going = [number for number in prompts if turn < len(self._questions[number].turns)]
            self._histories = {number: self._histories[number] for number in going}
        measured.batches.extend(Batch(category, tokens[category], seconds[category]) for category in tokens)

    def _prompts(self, turn: int, skipped: dict[str, str]) -> dict[int, list[int]]:
        """Return the prompts of a turn by the question's number; what cannot be asked is put among the `skipped`."""
        prompts: dict[int, list[int]] = {}
        for number, history in self._histories.items():
            question = self._questions[number]
            try:
                ids = _prompt(self._encoder, question, history, turn)
            except PromptRejected as error:
                skipped[question.source] = str(error)
                continue
            if 0 < len(ids) <= self._most:
                prompts[number] = ids
            else:
                skipped[question.source] = f"turn {turn + 1} has {len(ids)} tokens, there is room for {self._most}"
        return prompts


def _shares(generations: Sequence[Generation], seconds: float) -> list[float]:
    """Return each prompt's share of the `seconds` of a batch: by its own seconds where they are known, else alike."""
    own = [found.seconds if found.seconds is not None else 1.0 for found in generations]
    return [seconds * part / sum(own) for part in own]


def _prompt(encoder: PromptEncoder, question: Question, history: list[Message], turn: int) -> list[int]:
    """Return the prompt of a turn; `history`, which gets what is said in it, has the turns before."""
    if not question.turns:
        return encoder.encode_prompt(question.record)
    assert isinstance(question.record, Conversation)
    history.extend(question.turns[turn])
    return encoder.encode_prompt(
        Conversation(list(history), question.record.tools, template_kwargs=question.record.template_kwargs)
    )
