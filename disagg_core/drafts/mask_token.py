"""Which token stands in the slots that a draft has to fill: one that never occurs in text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from disagg_core.errors import BadInput
from disagg_core.run_spec.document import TargetSection
from disagg_core.run_spec.section import is_local
from disagg_core.target.facts import TargetFacts
from disagg_core.target.tokenizer import load_tokenizer


@dataclass(frozen=True)
class SpareTokens:
    """What a tokenizer says about the ids that no text has; `length` counts added tokens too."""

    length: int
    mask_token_id: int | None = None
    special_ids: frozenset[int] = frozenset()

    def makes_of_text(self, token: int) -> bool:
        """Tell whether `token` may occur in text that was tokenized."""
        return token < self.length and token != self.mask_token_id and token not in self.special_ids


def spare_tokens_of(facts: TargetFacts) -> SpareTokens | None:
    """Return what the target's tokenizer says, or None where there is none to ask.

    That is a directory without a tokenizer, and a hub model that is planned from ``target.config`` alone.

    Raises:
        TargetError: the tokenizer cannot be read.
    """
    if is_local(facts.model):
        if not (Path(facts.model).expanduser() / "tokenizer_config.json").is_file():
            return None
    elif facts.commit is None:
        return None
    return _loaded(facts.model, facts.commit)


@cache
def _loaded(model: str, commit: str | None) -> SpareTokens:
    tokenizer = load_tokenizer(TargetSection(model=model, revision=commit))
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return SpareTokens(len(tokenizer), tokenizer.mask_token_id, frozenset(special))


def mask_token_of(chosen: int | None, facts: TargetFacts, tokenizer: SpareTokens | None = None) -> int:
    """Return the mask token's id: the document's, the tokenizer's mask token, or the first row beyond the tokenizer.

    Published drafts of Qwen3 and its successors have the first embedding row that the tokenizer does not use. Padding
    and end-of-sequence tokens are never taken: text ends with them.

    Args:
        chosen: ``draft.mask_token_id`` of the document.
        facts: of the target.
        tokenizer: the target's; None where it is not known.

    Raises:
        BadInput: the id is outside the vocabulary or is a token of text, or there is none to take.
    """
    if chosen is None and tokenizer is not None:
        chosen = tokenizer.mask_token_id
        if chosen is None and tokenizer.length < facts.vocab_size:
            return tokenizer.length
    if chosen is None:
        known = "unknown" if tokenizer is None else f"{tokenizer.length} tokens and no mask token"
        raise BadInput(
            f"draft.mask_token_id: expected an id, because the target's vocabulary of {facts.vocab_size} has no row to "
            f"spare that could be found (tokenizer: {known}); give the id of a reserved special token, or of an "
            "embedding row that the tokenizer does not use"
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
    if tokenizer is not None and tokenizer.makes_of_text(chosen):
        raise BadInput(
            f"draft.mask_token_id: expected a token that never occurs in text, found {chosen}, which the tokenizer "
            f"makes of text; take an id that it does not use ({tokenizer.length} to {facts.vocab_size - 1}), or a "
            "reserved special token"
        )
    return chosen
