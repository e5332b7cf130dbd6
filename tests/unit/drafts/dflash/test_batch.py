"""How batches are made: padded, with blocks that depend on seed and sample alone."""

from __future__ import annotations

import pytest
import torch

from disagg_core.drafts.dflash.anchors import candidates, draw_anchors, stacked
from disagg_core.drafts.dflash.batch import slot_mask
from disagg_core.drafts.dflash.method import METHOD
from disagg_core.drafts.dflash.options import DFlashSection
from disagg_core.drafts.method import Sample
from disagg_core.drafts.randomness import generator_of
from tests.unit.drafts.dflash.cases import small_config, some_samples

pytestmark = pytest.mark.unit


def test_a_block_begins_where_two_neighbours_are_trained_on() -> None:
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1])
    assert candidates(mask).tolist() == [0, 3, 4]
    assert draw_anchors(mask, 10, torch.Generator()).tolist() == [0, 3, 4]


def test_anchors_are_drawn_evenly_without_repetition() -> None:
    mask = torch.ones(11, dtype=torch.uint8)
    counts = torch.zeros(10)
    for draw in range(600):
        found = draw_anchors(mask, 4, generator_of(1, f"s{draw}", "anchors"))
        assert found.tolist() == sorted(set(found.tolist()))
        assert len(found) == 4
        counts[found] += 1
    assert counts.min() > 200
    assert counts.max() < 280


def test_blocks_of_a_sample_do_not_depend_on_its_batch() -> None:
    config = small_config()
    section = DFlashSection(block_size=4, anchors=5, noise=0.05)
    samples = some_samples(config, [23, 9, 31])
    one = METHOD.batcher(section, config, seed=8)
    together, alone = one.collate(samples, multiple_of=16), one.collate(samples[1:2])
    count = int(alone.block_keep.sum())

    assert together.anchors[1, :count].tolist() == alone.anchors[0].tolist()
    assert int(together.block_keep[1].sum()) == count
    assert torch.equal(together.hidden_states[1, :9], alone.hidden_states[0])
    assert together.input_ids.shape == (3, 32)
    assert not together.loss_mask[1, 9:].any()

    again = METHOD.batcher(section, config, seed=8).collate(samples, multiple_of=16)
    assert torch.equal(again.anchors, together.anchors)
    assert torch.equal(again.hidden_states, together.hidden_states)


def test_seed_and_sample_id_change_the_blocks() -> None:
    config, section = small_config(), DFlashSection(block_size=4, anchors=5)
    (sample,) = some_samples(config, [60])
    later = Sample("s000000777", sample.tensors)
    drawn = [
        METHOD.batcher(section, config, seed=seed).collate([which]).anchors.tolist()
        for seed, which in ((8, sample), (9, sample), (8, later))
    ]
    assert drawn[0] != drawn[1]
    assert drawn[0] != drawn[2]


def test_noise_is_within_its_bounds_and_around_nothing() -> None:
    config = small_config()
    (sample,) = some_samples(config, [200])
    section = DFlashSection(block_size=4, noise=0.05)
    noisy = METHOD.batcher(section, config, seed=8).collate([sample]).hidden_states[0]
    difference = noisy - sample.tensors["aux_hidden_states"]
    assert 0.049 < float(difference.abs().max()) <= 0.0501
    assert abs(float(difference.mean())) < 0.003


def test_what_is_counted_is_what_is_trained() -> None:
    config, section = small_config(), DFlashSection(block_size=4, anchors=5)
    batcher = METHOD.batcher(section, config, seed=1)
    batch = batcher.collate(some_samples(config, [23, 9]))
    mask = slot_mask(batch, 4)
    assert batcher.trainable_positions(batch) == int(mask.sum()) > 0
    weights = torch.tensor([1.0, 1.0, (-torch.tensor(1 / 2)).exp(), (-torch.tensor(2 / 2)).exp()])
    assert batcher.normalisers(batch)["loss"] == pytest.approx(float((mask * weights).sum()))


def test_rows_with_fewer_blocks_are_filled_up_at_the_end() -> None:
    anchors, keep = stacked([torch.tensor([3, 7]), torch.tensor([], dtype=torch.int64)])
    assert anchors.tolist() == [[3, 7], [0, 0]]
    assert keep.tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize(("mask", "usable"), [([0, 1, 0, 1], False), ([0, 1, 1, 0], True), ([1], False), ([], False)])
def test_a_sample_without_two_neighbours_teaches_nothing(mask: list[int], usable: bool) -> None:
    said = METHOD.untrainable(mask)
    assert (said is None) == usable
    assert usable or "neighbouring" in str(said)
