"""The mask token is one that no text has: the document's if it is that, else the tokenizer's, else a spare row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from disagg_core.drafts.mask_token import SpareTokens, mask_token_of, spare_tokens_of
from disagg_core.errors import BadInput
from tests.contract.drafts.kit import VOCAB, tiny_facts

pytestmark = pytest.mark.unit


def test_the_first_row_beyond_the_tokenizer_is_taken() -> None:
    assert mask_token_of(None, tiny_facts(), SpareTokens(60)) == 60


def test_a_mask_token_of_the_tokenizer_comes_first_and_the_document_s_before_it() -> None:
    assert mask_token_of(None, tiny_facts(), SpareTokens(60, mask_token_id=7)) == 7
    assert mask_token_of(61, tiny_facts(), SpareTokens(60, mask_token_id=7)) == 61


def test_a_reserved_special_token_may_be_chosen_and_a_token_of_text_may_not() -> None:
    tokenizer = SpareTokens(VOCAB, special_ids=frozenset({9}))

    assert mask_token_of(9, tiny_facts(), tokenizer) == 9
    with pytest.raises(BadInput, match="found 10, which the tokenizer makes of text"):
        mask_token_of(10, tiny_facts(), tokenizer)


@pytest.mark.parametrize("tokenizer", [None, SpareTokens(VOCAB)])
def test_without_a_spare_row_the_document_has_to_choose(tokenizer: SpareTokens | None) -> None:
    with pytest.raises(BadInput, match=r"draft\.mask_token_id: expected an id, because"):
        mask_token_of(None, tiny_facts(), tokenizer)


def test_what_begins_ends_or_pads_text_is_refused() -> None:
    for token in (1, 2, 5):
        with pytest.raises(BadInput, match=f"found {token}, with which the target begins, ends or pads"):
            mask_token_of(token, tiny_facts(pad_token_id=5), SpareTokens(3))


def test_a_tokenizer_is_asked_where_the_target_has_one(tmp_path: Path) -> None:
    bare, full = tmp_path / "bare", tmp_path / "full"
    bare.mkdir()
    words = {word: number for number, word in enumerate(["a", "b", "c", "<s>", "<reserved>"])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")))
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<reserved>"]})
    tokenizer.save_pretrained(full)
    assert json.loads((full / "tokenizer_config.json").read_text())

    assert spare_tokens_of(tiny_facts(model=str(bare))) is None
    spare = spare_tokens_of(tiny_facts(model=str(full)))

    assert spare == SpareTokens(5, None, frozenset({3, 4}))
