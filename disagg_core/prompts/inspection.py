"""A look at prompts before any run: how many, of which format, how long, which would be rejected and why.

It reads as the producer does, record by record through the same parser and encoder, so that what it says is what a run
will do. Of a long file only some records, evenly spaced, are encoded, since tokenising takes its time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from disagg_core.errors import PromptError, PromptRejected
from disagg_core.prompts.bad_records import BadRecord, BadRecords, Refusals
from disagg_core.prompts.checks import records_looked_at
from disagg_core.prompts.encode import EncodedPrompt, PromptEncoder
from disagg_core.prompts.json_values import RecordError
from disagg_core.prompts.pool import FileOrder, Placed, StreamOrder, open_order, parse_placed
from disagg_core.prompts.records import detect_format
from disagg_core.prompts.shapes import (
    Conversation,
    PlainText,
    PromptResponse,
    Record,
    Tokenized,
    prompt_key,
    record_key,
)
from disagg_core.run_spec.document import RunSpec

MOST_ENCODED = 20_000
QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)

Run = tuple[str, bool]
"""A piece of a sample's text, and whether it is trained on."""


@dataclass
class Inspection:
    """What was found. ``records = usable + bad.count``; of the usable ones `encoded` were tokenised.

    `refused` are encoded records that a run would reject for their own form (too long, refused by the template).
    Lengths are ascending.
    """

    source: str
    bad: BadRecords
    records: int = 0
    whole: bool = True
    """Whether all records were looked at; of a stream only the first ones are."""
    formats: Counter[str] = field(default_factory=Counter)
    copies: int = 0
    """Records that another one equals in text, tools, what the template is given, and mask."""
    same_questions: int = 0
    """Further records that ask the same as an earlier one."""
    encoded: int = 0
    refused: Refusals = field(default_factory=Refusals)
    truncated: int = 0
    characters: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    sample: list[Run] = field(default_factory=list)
    sample_source: str = ""

    @property
    def usable(self) -> int:
        """Records that could be parsed."""
        return self.records - self.bad.count


def inspect_prompts(spec: RunSpec, tokenizer: Any | None, *, most_encoded: int = MOST_ENCODED) -> Inspection:
    """Look at the prompts of `spec`; with a tokenizer, as the producer of a run would encode them.

    Raises:
        PromptError: there are none, they are no file of records, or not one of them can be used.
    """
    order = open_order(spec.model_copy(update={"evaluation": spec.evaluation.model_copy(update={"prompts": 0})}))
    try:
        found = _inspect(spec, order, PromptEncoder(spec, tokenizer) if tokenizer is not None else None, most_encoded)
    finally:
        order.close()
    if not found.usable:
        raise PromptError(f"{found.source}: none of {found.records} records can be used: {found.bad.describe()}")
    for lengths in (found.characters, found.turns, found.tokens, found.trained):
        lengths.sort()
    return found


def _inspect(
    spec: RunSpec, order: FileOrder | StreamOrder, encoder: PromptEncoder | None, most_encoded: int
) -> Inspection:
    lenient = spec.data.model_copy(update={"on_bad_record": "reject"})
    found = Inspection(source=spec.data.prompts, bad=BadRecords(lenient, spec.data.prompts))
    found.whole = isinstance(order, FileOrder)
    every = max(1, -(-len(order.file) // most_encoded)) if isinstance(order, FileOrder) else 1
    texts: set[bytes] = set()
    questions: set[bytes] = set()
    for placed in records_looked_at(order):
        found.records += 1
        try:
            record = parse_placed(placed, spec.data)
        except BadRecord as error:
            found.bad.take(error)
            continue
        found.formats[_format_of(placed, spec)] += 1
        found.characters.append(_characters(record))
        found.turns.append(len(record.messages) if isinstance(record, Conversation) else 1)
        found.copies += _seen(texts, record_key(record))
        found.same_questions += _seen(questions, prompt_key(record))
        if encoder is not None and (found.records - 1) % every == 0:
            _encode(spec, encoder, placed.source, record, found)
        elif encoder is None and not found.sample:
            found.sample, found.sample_source = [(text, False) for text in _said(record)], placed.source
    return found


def _seen(known: set[bytes], key: bytes) -> bool:
    before = len(known)
    known.add(key)
    return len(known) == before


def _format_of(placed: Placed, spec: RunSpec) -> str:
    if spec.data.format != "auto":
        return spec.data.format
    named: dict[str, Any] = {name: placed.raw.get(column) for name, column in spec.data.fields.items()}
    try:
        return detect_format(named)
    except RecordError:
        return detect_format(placed.raw)


def _encode(spec: RunSpec, encoder: PromptEncoder, source: str, record: Record, found: Inspection) -> None:
    found.encoded += 1
    try:
        encoded = encoder.encode(record)
    except (PromptError, PromptRejected) as error:
        found.refused.add(source, str(error))
        return
    found.tokens.append(len(encoded.input_ids))
    found.trained.append(sum(encoded.loss_mask))
    found.truncated += len(encoded.input_ids) == spec.data.max_tokens and spec.data.generate is None
    if not found.sample:
        found.sample, found.sample_source = masked_text(encoder.tokenizer, encoded), source


def masked_text(tokenizer: Any, encoded: EncodedPrompt) -> list[Run]:
    """Return the text of `encoded` in pieces of equal mask."""
    ids, mask = encoded.input_ids, encoded.loss_mask
    borders = [n for n in range(len(ids)) if n == 0 or mask[n] != mask[n - 1]]
    runs: list[Run] = []
    before = ""
    for start, stop in zip(borders, [*borders[1:], len(ids)], strict=True):
        # Decoded from the start each time: some tokenizers drop the space before the first token.
        upto = str(tokenizer.decode(ids[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        piece = upto[len(before) :] if upto.startswith(before) else tokenizer.decode(ids[start:stop])
        runs.append((piece, bool(mask[start])))
        before = upto
    return runs


def _characters(record: Record) -> int:
    return 0 if isinstance(record, Tokenized) else sum(len(text) for text in _said(record))


def _said(record: Record) -> Iterator[str]:
    match record:
        case Conversation(messages):
            yield from (f"{message['role']}: {message['content']}\n" for message in messages)
        case PromptResponse(prompt, response):
            yield f"prompt: {prompt}\n"
            if response is not None:
                yield f"response: {response}\n"
        case PlainText(text):
            yield text
        case Tokenized(input_ids):
            yield f"{len(input_ids)} token ids"


def quantiles(ascending: list[int]) -> list[int]:
    """Return the values at `QUANTILES` of `ascending`, nearest rank; none of an empty list."""
    return [ascending[round(share * (len(ascending) - 1))] for share in QUANTILES] if ascending else []
