"""A sample that fills a batch is trained where it lies: its step only reads it, and computes what a copy would give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.contract.drafts.kit import SEED, Case, gradients

pytestmark = pytest.mark.unit


def parts_of(batch: object) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("packed", [False, True])
def test_its_states_are_not_copied(case: Case, packed: bool) -> None:
    sample = case.sample(0)

    batch = case.method.batcher(case.options, case.config, seed=SEED).collate([sample], packed=packed)

    places = {value.untyped_storage().data_ptr() for value in parts_of(batch).values()}
    assert sample.tensors["aux_hidden_states"].untyped_storage().data_ptr() in places


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_leaves_it_as_it_was_and_gives_what_a_copy_gives(case: Case, packed: bool) -> None:
    sample, shared, copied = case.sample(0), case.draft(), case.draft()
    before = {name: tensor.clone() for name, tensor in sample.tensors.items()}
    batcher = case.method.batcher(case.options, case.config, seed=SEED)
    batch = batcher.collate([sample], packed=packed)
    apart = replace(batch, **{name: value.clone() for name, value in parts_of(batch).items()})
    losses = []
    for draft, own in ((shared, batch), (copied, apart)):
        normalisers = {name: torch.tensor(value) for name, value in batcher.normalisers(own).items()}
        module = case.method.loss(draft, case.parts, case.options, activation_checkpointing=False)
        losses.append(module(own, normalisers).total)
        losses[-1].backward()

    assert torch.equal(*losses)
    found, expected = gradients(shared), gradients(copied)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert all(torch.equal(sample.tensors[name], before[name]) for name in before)
