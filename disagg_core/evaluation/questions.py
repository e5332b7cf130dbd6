"""The questions of a suite, read from its file.

A suite is a file in Spec-Bench's form (``question_id``, ``category``, ``turns``) or in any format of prompts. A
question of several turns is asked turn by turn, each after the model's own answers to those before; answers that the
data has are not read. A record without a ``category`` is of the category ``all``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from disagg_core.prompts.bad_records import BadRecord, BadRecords
from disagg_core.prompts.pinned import PinnedFile
from disagg_core.prompts.pool import Placed, parse_placed
from disagg_core.prompts.record_files import open_records
from disagg_core.prompts.records import questions_of
from disagg_core.prompts.shapes import Conversation, Message, Record
from disagg_core.run_spec.document import DataSection

ALL = "all"
"""The category of questions that have none."""


@dataclass(frozen=True)
class Question:
    """One question of a suite: a conversation to be held turn by turn, or a `record` that is one prompt.

    Each of `turns` is what is said before the model answers: the user's messages, with the system's at the start.
    """

    source: str
    category: str
    record: Record
    turns: tuple[tuple[Message, ...], ...] = ()


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
