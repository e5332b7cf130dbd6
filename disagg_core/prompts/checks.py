"""What is checked about a run's prompts before anything starts, and the held-out ones for its evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from disagg_core.drafts.together import untrainable
from disagg_core.errors import PromptError, PromptRejected
from disagg_core.prompts.bad_records import BadRecord, BadRecords
from disagg_core.prompts.encode import PromptEncoder
from disagg_core.prompts.loss_mask import UnmaskableTemplate
from disagg_core.prompts.pinned import PinnedData, PinnedFile
from disagg_core.prompts.pool import (
    FileOrder,
    HeldOut,
    Placed,
    StreamOrder,
    open_order,
    parse_placed,
    read_held_out,
)
from disagg_core.prompts.shapes import Record, is_running_text, prompt_key
from disagg_core.run_spec.document import RunSpec
from disagg_core.target.facts import TargetFacts

log = logging.getLogger(__name__)

_PROBED = 32
_STREAM_CHECKED = 256
_MOST_TWINS = 0.5
"""Part of the prompts that may ask the same as a held-out one."""


@dataclass(frozen=True)
class PromptFacts:
    """What is known about a run's prompts before it starts; counts are None for streams that do not say.

    `count` is the number of prompts in an epoch after hold-out and limit, `total` that of all epochs; `bad` of the rows
    looked at cannot be used and will be rejected. `evaluated` is what the evaluation decodes, as the lines of its file,
    and `tokens` are the ids that the first prompts have; without a tokenizer there are none.
    """

    rows: int | None
    held_out: int
    count: int | None
    total: int | None
    data: PinnedData
    bad: int = 0
    evaluated: bytes = field(default=b"", repr=False)
    tokens: frozenset[int] = field(default=frozenset(), repr=False)


def validate_prompts(
    spec: RunSpec,
    tokenizer: Any | None = None,
    facts: TargetFacts | None = None,
    pinned: PinnedData | None = None,
) -> PromptFacts:
    """Check every record of a prompts file (of a streamed dataset: its first rows) and return the counts.

    With a tokenizer the first prompts of the order are encoded as well, so that a missing or unmaskable chat template
    shows before a GPU is held, and so are the held-out ones that the evaluation decodes. With `facts`,
    `data.max_tokens` is checked against the target's context. With `pinned`, what was pinned is read.

    Raises:
        PromptError: missing, empty, more records of no use than allowed (file, lines, why), nothing usable among the
            first prompts, a held-out prompt that is also trained on, held-out prompts that cannot be told from those to
            train on or that cannot be decoded, or samples longer than the target's context.
        DataChanged: the data is not what was pinned.
    """
    if facts is not None and spec.data.max_tokens > facts.max_position_embeddings:
        raise PromptError(
            f"data.max_tokens: expected at most {facts.max_position_embeddings}, the longest context of "
            f"{facts.model}, found {spec.data.max_tokens}"
        )
    _check_continuations(spec)
    order = open_order(spec, pinned)
    lines, tokens = b"", frozenset[int]()
    try:
        held_out = read_held_out(spec, order, pinned)
        _check_measured(spec, held_out)
        bad = _check_records(spec, order, held_out)
        if tokenizer is not None:
            encoder = PromptEncoder(spec, tokenizer, facts)
            tokens = _probe(spec, order, encoder)
            lines = _evaluated(spec, encoder, held_out)
        rows = len(order.file) if isinstance(order, FileOrder) else order.stream.rows
        count = order.expected
    finally:
        order.close()
    if count == 0:
        raise PromptError(f"{spec.data.prompts}: no prompt is left to train on, {len(held_out.records)} are held out")
    total = None if count is None else count * spec.data.epochs
    data = PinnedData(prompts=order.pin, holdout=held_out.pin, evaluation=PinnedFile.of(lines) if lines else None)
    return PromptFacts(rows, len(held_out.records), count, total, data, bad=bad, evaluated=lines, tokens=tokens)


def _check_measured(spec: RunSpec, held_out: HeldOut) -> None:
    """Check that there is something to measure drafts on while they are trained, if that is asked for."""
    if spec.training.heldout is not None and not held_out.records:
        raise PromptError(
            "training.heldout.prompts: expected some held-out prompts to measure drafts on, found too few prompts to "
            "hold a quarter of them out; give others in data.holdout, or remove training.heldout"
        )


def _check_continuations(spec: RunSpec) -> None:
    """Check that the draft can be trained on a continuation of full length."""
    if spec.data.generate is not None:
        longest = spec.data.generate.max_new_tokens
        mask = [0] * max(1, spec.data.max_tokens - longest) + [1] * longest
        if (reason := untrainable(spec.all_drafts, mask)) is not None:
            raise PromptError(f"data.generate.max_new_tokens: {longest} are too few to train on: {reason}")


def _check_records(spec: RunSpec, order: FileOrder | StreamOrder, held_out: HeldOut) -> int:
    """Parse the records, all of a file's, compare them with the held-out prompts, and count those of no use.

    Prompts are held out by what they ask. Where most ask the same as a held-out one, hardly any would be left to train
    on, and the accept length would be measured on the prompts that were trained on.
    """
    keys = {prompt_key(record): where for where, record in held_out.records}
    bad = BadRecords(spec.data, spec.data.prompts)
    seen, twins = 0, 0
    for placed in records_looked_at(order):
        seen += 1
        try:
            twin = keys.get(prompt_key(parse_placed(placed, spec.data)))
        except BadRecord as error:
            bad.take(error)
            continue
        if twin is not None and spec.data.holdout is not None:
            raise PromptError(
                f"{placed.source} asks the same as the held-out prompt at {twin}: an accept length measured on what "
                "was trained on says nothing; take the prompt out of one of the files"
            )
        twins += twin is not None
    bad.check(seen)
    if bad.count:
        log.warning("%d of %d records cannot be used: %s", bad.count, seen, bad.describe())
    if spec.data.holdout is None:
        held = len(held_out.records)  # they are among the records
        _check_twins(spec, twins - held, seen - bad.count - held)
    return bad.count


def records_looked_at(order: FileOrder | StreamOrder) -> Iterator[Placed]:
    """Yield what is parsed before a run: all records of a file in their own order, the first ones of a stream."""
    if isinstance(order, FileOrder):
        for index in range(len(order.file)):
            yield Placed.of(order.file, index)
        return
    name = order.stream.name.name
    for number, raw in enumerate(order.stream.first(_STREAM_CHECKED), 1):
        yield Placed(raw, f"{name}:{number}")


def _check_twins(spec: RunSpec, twins: int, others: int) -> None:
    """Judge that `twins` of the `others` that are not held out ask the same as a prompt that is."""
    if twins > max(others, 0) * _MOST_TWINS:
        raise PromptError(
            f"{spec.data.prompts}: {twins} of {others} prompts ask the same as one that is held out for the "
            "evaluation, and would not be trained on; give held-out prompts of their own (data.holdout), or set "
            "evaluation.prompts: 0"
        )
    if twins > 0:
        log.warning("%d of %d prompts ask the same as a held-out one and are not trained on", twins, others)


def _probe(spec: RunSpec, order: FileOrder | StreamOrder, encoder: PromptEncoder) -> frozenset[int]:
    """Encode the first prompts of the order and return the ids in them; some must be usable, and every one maskable."""
    reasons: list[str] = []
    tokens: set[int] = set()
    for position in range(_PROBED):
        placed = order.place(0, position)
        if placed is None:
            break
        try:
            tokens.update(encoder.encode(parse_placed(placed, spec.data)).input_ids)
        except UnmaskableTemplate as error:
            raise PromptError(f"{placed.source}: {error}") from error
        except (BadRecord, PromptRejected) as error:
            reasons.append(f"{placed.source}: {error}")
    if reasons and not tokens:
        raise PromptError(f"none of the first {len(reasons)} prompts can be trained on; {reasons[0]}")
    return frozenset(tokens)


def _evaluated(spec: RunSpec, encoder: PromptEncoder, held_out: HeldOut) -> bytes:
    """Return the lines of the file that the evaluation reads; none if it is switched off.

    Raises:
        PromptError: it is not, and there is nothing to decode.
    """
    wanted = spec.evaluation.prompts
    prompts = _encoded(spec, encoder, held_out, wanted)
    if wanted and not prompts:
        found = (
            f"{len(held_out.records)} held-out prompts, none of which can be encoded and leaves room in "
            f"data.max_tokens ({spec.data.max_tokens})"
            if held_out.records
            else "too few prompts to hold a quarter of them out"
        )
        raise PromptError(
            f"evaluation.prompts: expected some held-out prompts to decode, found {found}; raise data.max_tokens, give "
            "other prompts in data.holdout, or set evaluation.prompts: 0"
        )
    if len(prompts) < wanted:
        log.warning("the evaluation decodes %d prompts, %d were asked for", len(prompts), wanted)
    return b"".join(msgspec.json.encode({"input_ids": ids}) + b"\n" for ids in prompts)


def heldout_prompts(spec: RunSpec, tokenizer: Any, n: int) -> list[list[int]]:
    """Return the token ids of the first `n` held-out prompts, each ending where the target continues.

    Of running text without `data.generate` the first half is the prompt. Prompts that cannot be encoded, or leave no
    room in `data.max_tokens`, are left out.

    Raises:
        PromptError: the prompts or the holdout file are missing or broken.
    """
    order = open_order(spec)
    try:
        held_out = read_held_out(spec, order)
    finally:
        order.close()
    return _encoded(spec, PromptEncoder(spec, tokenizer), held_out, n)


def _encoded(spec: RunSpec, encoder: PromptEncoder, held_out: HeldOut, n: int) -> list[list[int]]:
    prompts: list[list[int]] = []
    for _, record in held_out.records:
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
    return ids[: max(1, len(ids) // 2)] if halve and is_running_text(record) else ids
