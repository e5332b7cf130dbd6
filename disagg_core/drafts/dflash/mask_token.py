"""Which token stands in the slots that a draft has to fill: one that never occurs in text."""

from __future__ import annotations

from collections.abc import Collection

from disagg_core.drafts.dflash.options import BlockDraftSection
from disagg_core.errors import BadInput
from disagg_core.target.facts import TargetFacts


def mask_token_of(
    options: BlockDraftSection,
    facts: TargetFacts,
    tokenizer_length: int | None,
    tokenizer_mask_id: int | None,
    special_ids: Collection[int] = (),
) -> int:
    """Return the mask token's id: the document's, the tokenizer's mask token, or the first row beyond the tokenizer.

    Published drafts of Qwen3 and its successors have the first embedding row that the tokenizer does not use. Padding
    and end-of-sequence tokens are never taken: text ends with them.

    Args:
        options: of the draft.
        facts: of the target.
        tokenizer_length: tokens of the tokenizer, added ones included; None where it is not known.
        tokenizer_mask_id: its mask token, if it has one.
        special_ids: its special tokens, among which a reserved one may be chosen.

    Raises:
        BadInput: the id is outside the vocabulary or is a token of text, or there is none to take.
    """
    chosen = options.mask_token_id
    if chosen is None:
        chosen = tokenizer_mask_id
    if chosen is None and tokenizer_length is not None and tokenizer_length < facts.vocab_size:
        return tokenizer_length
    if chosen is None:
        known = "unknown" if tokenizer_length is None else f"{tokenizer_length} tokens and no mask token"
        raise BadInput(
            f"draft.mask_token_id: expected an id, because the target's vocabulary of {facts.vocab_size} has no row to "
            f"spare that could be found (tokenizer: {known}); give the id of a reserved special token"
        )
    if chosen >= facts.vocab_size:
        raise BadInput(
            f"draft.mask_token_id: expected an id below the target's vocabulary size {facts.vocab_size}, found {chosen}"
        )
    if chosen in (*facts.eos_token_ids, facts.bos_token_id, facts.pad_token_id):
        raise BadInput(
            f"draft.mask_token_id: expected a token that never occurs in a sample, found {chosen}, with which the "
            "target begins, ends or pads text"
        )
    reserved = chosen == tokenizer_mask_id or chosen in special_ids
    if tokenizer_length is not None and chosen < tokenizer_length and not reserved:
        raise BadInput(
            f"draft.mask_token_id: expected a token that never occurs in text, found {chosen}, which the tokenizer "
            f"makes of text; take an id from {tokenizer_length} to {facts.vocab_size - 1}, or a reserved special token"
        )
    return chosen
