"""The vocabulary map: most frequent tokens, ties, filling up, and a hash that says what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from disagg_core.drafts.vocab import VocabMap, count_tokens, derive_vocab_map
from disagg_core.errors import BadInput

pytestmark = pytest.mark.unit


def test_the_most_frequent_tokens_are_chosen_in_ascending_order() -> None:
    vocab_map = VocabMap.from_counts(torch.tensor([0, 9, 0, 4, 7, 1]), 3)
    assert vocab_map.target_ids.tolist() == [1, 3, 4]
    assert vocab_map.d2t.tolist() == [1, 2, 2]
    assert vocab_map.d2t.dtype == torch.int64
    assert vocab_map.t2d.tolist() == [False, True, False, True, True, False]


def test_equal_counts_are_decided_by_the_smaller_id() -> None:
    assert VocabMap.from_counts(torch.tensor([2, 5, 5, 5, 2]), 2).target_ids.tolist() == [1, 2]


def test_too_few_seen_tokens_are_filled_up_with_the_smallest_unused_ids() -> None:
    assert VocabMap.from_counts(torch.tensor([0, 0, 0, 3, 0, 1]), 4).target_ids.tolist() == [0, 1, 3, 5]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_any_counts(counts: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(counts)))
    vocab_map = VocabMap.from_counts(torch.tensor(counts), k)
    expected = sorted(sorted(range(len(counts)), key=lambda token: (-counts[token], token))[:k])
    assert vocab_map.target_ids.tolist() == expected
    assert vocab_map.t2d.nonzero().flatten().tolist() == expected


def test_tokens_that_must_be_proposable_are_kept_however_rare_they_are() -> None:
    counts = torch.tensor([4, 9, 0, 4, 7, 1])
    assert VocabMap.from_counts(counts, 3, always=[2, 5]).target_ids.tolist() == [1, 2, 5]
    assert VocabMap.from_counts(counts, 2, always=[2, 5, 5]).target_ids.tolist() == [2, 5]
    assert counts.tolist() == [4, 9, 0, 4, 7, 1]


def test_the_version_is_the_content() -> None:
    counts = torch.tensor([1, 5, 3, 0])
    assert VocabMap.from_counts(counts, 2, "a").version == VocabMap.from_counts(counts * 2, 2, "b").version
    assert VocabMap.from_counts(counts, 2).version != VocabMap.from_counts(counts, 3).version
    assert VocabMap.from_counts(counts, 4).version == VocabMap.identity(4).version


def test_a_saved_map_is_read_back_with_what_it_was_counted_from(tmp_path: Path) -> None:
    saved = VocabMap.from_counts(torch.tensor([1, 5, 3, 0]), 2, inputs_version="prompts-1")
    path = tmp_path / "new" / "vocab_map.safetensors"
    saved.save(path)
    loaded = VocabMap.load(path)
    assert torch.equal(loaded.t2d, saved.t2d)
    assert torch.equal(loaded.d2t, saved.d2t)
    assert (loaded.version, loaded.inputs_version) == (saved.version, "prompts-1")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_others_may_read_a_saved_map_like_any_new_file(tmp_path: Path) -> None:
    path, plain = tmp_path / "vocab_map.safetensors", tmp_path / "plain"
    plain.touch()
    VocabMap.identity(4).save(path)
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_damaged_or_missing_map_is_named_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "vocab_map.safetensors"
    with pytest.raises(BadInput, match="cannot read"):
        VocabMap.load(path)
    VocabMap.from_counts(torch.tensor([1, 5, 3, 0]), 2).save(path)
    tensors = load_file(path)
    tensors["t2d"][0] = True
    save_file(tensors, path, metadata={"version": "0" * 16})
    with pytest.raises(BadInput, match="delete it to derive it again"):
        VocabMap.load(path)


def test_a_vocabulary_larger_than_the_target_is_refused() -> None:
    with pytest.raises(BadInput, match=r"draft\.vocab_size: expected 1 to 4"):
        VocabMap.from_counts(torch.ones(4), 5)


def test_a_map_is_derived_once_for_the_same_inputs(tmp_path: Path) -> None:
    path = tmp_path / "vocab_map.safetensors"
    seen: list[int] = []

    def samples() -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(torch.tensor([4, 4, 2, 0]), torch.tensor([1, 1, 1, 0])), (torch.tensor([2, 5]), torch.tensor([1, 0]))]

    def derive(inputs_version: str, k: int = 2) -> VocabMap:
        return derive_vocab_map(
            path,
            lambda: count_tokens(samples(), 6, seen.append),
            vocab_size=6,
            draft_vocab_size=k,
            inputs_version=inputs_version,
        )

    assert derive("a").target_ids.tolist() == [2, 4]
    assert seen == [1, 2]
    assert derive("a").target_ids.tolist() == [2, 4]
    assert seen == [1, 2]  # nothing was counted again
    assert derive("b").inputs_version == "b"
    assert derive("b", 3).target_ids.tolist() == [0, 2, 4]
    assert seen == [1, 2] * 3
    assert derive("b", 6).version == VocabMap.identity(6).version


def test_a_sample_with_an_id_that_is_not_the_targets_counts_for_nothing() -> None:
    samples = [
        (torch.tensor([4, 4, 4, 6]), torch.ones(4)),
        (torch.tensor([-1, 4]), torch.ones(2)),
        (torch.tensor([2, 5]), torch.ones(2)),
    ]

    assert count_tokens(samples, 6).tolist() == [0, 0, 1, 0, 0, 1]
