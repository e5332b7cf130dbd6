"""What is checked about a run's prompts before anything starts, and the held-out ones for its evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from disagg_core.errors import PromptError, PromptRejected
from disagg_core.prompts.encode import PromptEncoder
from disagg_core.prompts.loss_mask import UnmaskableTemplate
from disagg_core.prompts.pool import (
    FileOrder,
    Placed,
    StreamOrder,
    held_out_records,
    open_order,
    parse_placed,
)
from disagg_core.prompts.records import PlainText, Record, prompt_key
from disagg_core.run_spec.document import RunSpec
from disagg_core.target.facts import TargetFacts

_PROBED = 32
_STREAM_CHECKED = 256


@dataclass(frozen=True)
class PromptFacts:
    """What is known about a run's prompts before it starts; counts are None for streams that do not say.

    `count` is the number of prompts in an epoch after hold-out and limit, `total` that of all epochs.
    """

    rows: int | None
    held_out: int
    count: int | None
    total: int | None


def validate_prompts(spec: RunSpec, tokenizer: Any | None = None, facts: TargetFacts | None = None) -> PromptFacts:
    """Check every line of a prompts file (of a streamed dataset: its first rows) and return the counts.

    With a tokenizer the first prompts of the order are encoded as well, so that a missing or unmaskable chat template
    shows before a GPU is held. With `facts`, `data.max_tokens` is checked against the target's context.

    Raises:
        PromptError: missing, empty, a broken line (file, line, what), nothing usable among the first prompts, a
            held-out prompt that is also trained on, or samples longer than the target's context.
    """
    if facts is not None and spec.data.max_tokens > facts.max_position_embeddings:
        raise PromptError(
            f"data.max_tokens: expected at most {facts.max_position_embeddings}, the longest context of "
            f"{facts.model}, found {spec.data.max_tokens}"
        )
    order = open_order(spec)
    try:
        held_out = held_out_records(spec, order)
        given = {prompt_key(record): where for where, record in held_out} if spec.data.holdout is not None else {}
        _check_records(spec, order, given)
        if tokenizer is not None:
            _probe(spec, order, PromptEncoder(spec, tokenizer))
        rows = len(order.file) if isinstance(order, FileOrder) else order.stream.rows
        count = order.per_epoch
    finally:
        order.close()
    if count == 0:
        raise PromptError(f"{spec.data.prompts}: no prompt is left to train on, {len(held_out)} are held out")
    total = None if count is None else count * spec.data.epochs
    return PromptFacts(rows=rows, held_out=len(held_out), count=count, total=total)


def _check_records(spec: RunSpec, order: FileOrder | StreamOrder, held_out: dict[bytes, str]) -> None:
    """Parse the records, all of a file's, and compare them with the given held-out prompts."""
    if isinstance(order, FileOrder):
        file = order.file
        records: Iterable[Placed] = (Placed(file.read(index), file.where(index)) for index in range(len(file)))
    else:
        name = order.stream.name.name
        records = (Placed(raw, f"{name}:{number}") for number, raw in enumerate(order.stream.first(_STREAM_CHECKED), 1))
    for placed in records:
        record = parse_placed(placed, spec.data.format)
        if held_out and (twin := held_out.get(prompt_key(record))):
            raise PromptError(
                f"{placed.source} asks the same as the held-out prompt at {twin}: an accept length measured on what "
                "was trained on says nothing; take the prompt out of one of the files"
            )


def _probe(spec: RunSpec, order: FileOrder | StreamOrder, encoder: PromptEncoder) -> None:
    """Encode the first prompts of the order; some must be usable, and every one maskable."""
    reasons: list[str] = []
    usable = 0
    for position in range(_PROBED):
        placed = order.place(0, position)
        if placed is None:
            break
        try:
            encoder.encode(parse_placed(placed, spec.data.format))
        except UnmaskableTemplate as error:
            raise PromptError(f"{placed.source}: {error}") from error
        except PromptRejected as error:
            reasons.append(f"{placed.source}: {error}")
        else:
            usable += 1
    if reasons and not usable:
        raise PromptError(f"none of the first {len(reasons)} prompts can be trained on; {reasons[0]}")


def heldout_prompts(spec: RunSpec, tokenizer: Any, n: int) -> list[list[int]]:
    """Return the token ids of the first `n` held-out prompts, each ending where the target continues.

    Of running text without `data.generate` the first half is the prompt. Prompts that cannot be encoded, or leave no
    room in `data.max_tokens`, are left out.

    Raises:
        PromptError: the prompts or the holdout file are missing or broken.
    """
    order = open_order(spec)
    try:
        records = held_out_records(spec, order)
    finally:
        order.close()
    encoder = PromptEncoder(spec, tokenizer)
    prompts: list[list[int]] = []
    for _, record in records:
        if len(prompts) == n:
            break
        ids = _prompt_ids(encoder, record, halve=spec.data.generate is None)
        if ids is not None and 0 < len(ids) < spec.data.max_tokens:
            prompts.append(ids)
    return prompts


def _prompt_ids(encoder: PromptEncoder, record: Record, *, halve: bool) -> list[int] | None:
    try:
        ids = encoder.encode_prompt(record)
    except PromptRejected:
        return None
    return ids[: max(1, len(ids) // 2)] if halve and isinstance(record, PlainText) else ids
