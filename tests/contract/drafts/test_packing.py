"""Samples packed in one row: to every draft method they are what they are one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from disagg_core.drafts.figures import LossOutput
from disagg_core.drafts.method import DraftModel, Sample
from disagg_core.drafts.registry import method_names
from tests.contract.drafts.kit import SEED, Case, gradients
from tests.contract.drafts.test_contract import small_case

pytestmark = pytest.mark.unit

LENGTHS = (18, 5, 33, 7, 25, 11)


def samples_of(case: Case) -> list[Sample]:
    """Samples of unlike lengths: one too short to be trained on, some with holes, all trained to their last token."""
    samples = [case.sample(number, tokens) for number, tokens in enumerate(LENGTHS)]
    holes = [0] * 4 + [int(token % 5 > 0) for token in range(LENGTHS[2] - 4)]
    return [*samples, case.sample(9, LENGTHS[2], holes), case.sample(10, 12, [1] * 12), case.sample(11, 3, [0, 1, 0])]


def trainable(case: Case, sample: Sample) -> bool:
    """Whether there is anything in `sample` to train on; a batch without is never computed."""
    return case.method.untrainable(sample.tensors["loss_mask"].tolist()) is None


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of gradients, each relative to the norm of its own."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - expected[name]).abs().max()) / max(1.0, float(expected[name].norm())) for name in expected
    )


def assert_same(found: LossOutput, expected: LossOutput) -> None:
    assert float(found.total) == pytest.approx(float(expected.total), abs=1e-6)
    for name, ratio in found.ratios.items():
        torch.testing.assert_close(ratio.value(), expected.ratios[name].value(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("multiple_of", [1, 64])
def test_a_packed_batch_is_its_samples_one_by_one(case: Case, multiple_of: int) -> None:
    samples, together, apart = samples_of(case), case.draft(), case.draft()

    whole = case.loss_of(together, samples, packed=True, multiple_of=multiple_of)
    parts = case.loss_of(apart, *([sample] for sample in samples if trainable(case, sample)))

    assert_same(whole, parts)
    assert distance(gradients(together), gradients(apart)) <= 1e-6


def test_a_packed_batch_is_the_padded_one(case: Case) -> None:
    samples, packed, padded = samples_of(case), case.draft(), case.draft()

    found, expected = case.loss_of(packed, samples, packed=True), case.loss_of(padded, samples)

    assert_same(found, expected)
    assert distance(gradients(packed), gradients(padded)) <= 1e-6


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 2**20)), min_size=1, max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.parametrize("name", method_names())
def test_packing_counts_what_padding_counts(name: str, drawn: list[tuple[int, int]]) -> None:
    case = small_case(name)
    samples = [
        case.sample(number, tokens, [bits >> place & 1 for place in range(tokens)])
        for number, (tokens, bits) in enumerate(drawn)
    ]
    batcher = case.method.batcher(case.options, case.config, seed=SEED)

    packed, padded = batcher.collate(samples, packed=True), batcher.collate(samples)

    assert batcher.trainable_positions(packed) == batcher.trainable_positions(padded)
    assert batcher.normalisers(packed) == batcher.normalisers(padded)


def gradients_with(case: Case, neighbour: Sample, sample: Sample) -> tuple[dict[str, Tensor], DraftModel]:
    draft = case.draft()
    case.loss_of(draft, [neighbour, sample, neighbour], packed=True)
    return gradients(draft), draft


def test_nothing_of_a_sample_reaches_its_neighbour_in_the_row(case: Case) -> None:
    """A neighbour that is not trained on adds nothing, whatever states and tokens it holds on either side."""
    sample = case.sample(0, 20)
    dead = case.sample(1, 15, [0] * 15)
    wild = replace(
        dead,
        tensors={
            name: tensor * 1e4 if tensor.is_floating_point() else tensor if name == "loss_mask" else tensor.flip(0)
            for name, tensor in dead.tensors.items()
        },
    )
    alone = case.draft()
    expected = case.loss_of(alone, [sample])

    beside_dead, _ = gradients_with(case, dead, sample)
    beside_wild, _ = gradients_with(case, wild, sample)

    assert distance(beside_dead, gradients(alone)) <= 1e-6
    assert all(torch.equal(beside_wild[name], beside_dead[name]) for name in beside_dead)
    assert_same(case.loss_of(case.draft(), [wild, sample], packed=True), expected)


def test_states_of_packed_samples_hold_no_padding(case: Case) -> None:
    batcher = case.method.batcher(case.options, case.config, seed=SEED)

    batch = batcher.collate(samples_of(case), packed=True)

    states = [value for value in vars(batch).values() if isinstance(value, Tensor) and value.dim() == 3]
    assert states
    assert {tuple(value.shape[:2]) for value in states} == {(1, sum(len(sample) for sample in samples_of(case)))}
