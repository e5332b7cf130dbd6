"""Token ids of a text with the characters that each token stands for, white space included."""

from __future__ import annotations

import copy
from typing import Any

Span = tuple[int, int]


class OffsetTokenizer:
    """Tokenises without special tokens of its own. Safe from several threads.

    Byte-level tokenizers may trim white space off the offsets (``trim_offsets``, as GPT-NeoX, OLMo and RoBERTa do): a
    token of spaces only then stands for no character, and code loses its indentation. Theirs are taken untrimmed.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._untrimmed = _untrimmed(tokenizer.backend_tokenizer) if tokenizer.is_fast else None

    def __call__(self, text: str) -> tuple[list[int], list[Span]]:
        """Return ids and character spans of the tokens of `text`. Needs a fast tokenizer."""
        if self._untrimmed is not None:
            encoding = self._untrimmed.encode(text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return found["input_ids"], found["offset_mapping"]


def _untrimmed(backend: Any) -> Any | None:
    """Return a copy of a tokenizer that does not trim offsets; None where it does not in any case."""
    from tokenizers.processors import ByteLevel

    trimming = backend.post_processor is not None and b'"trim_offsets":true' in backend.post_processor.__getstate__()
    if not trimming:
        return None
    untrimmed = copy.deepcopy(backend)
    untrimmed.post_processor = ByteLevel(trim_offsets=False)  # the others only add special tokens
    untrimmed.no_truncation()
    untrimmed.no_padding()
    return untrimmed
