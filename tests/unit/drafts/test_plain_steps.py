"""The plain eager steps that the benchmarks measure against compute the same loss and gradients."""

from __future__ import annotations

import pytest
import torch

from disagg_core.drafts.dflash.options import default_gamma
from disagg_core.drafts.method import DraftModel
from tests.benchmarks.baselines.eager_dflash import eager_dflash
from tests.benchmarks.baselines.eager_dspark import eager_dspark
from tests.contract.drafts.kit import HIDDEN, SEED, Case, gradients

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", ["dflash", "dflash2", "dspark"])
def test_the_plain_step_is_the_step(name: str) -> None:
    case = Case.of(name)
    samples = [case.sample(0, 30), case.sample(1, 22)]
    fused, plain = case.draft(), case.draft()

    total = case.loss_of(fused, samples).total
    loss = plain_loss(case, plain, samples)
    loss.backward()

    assert float(loss.detach()) == pytest.approx(float(total), rel=1e-5)
    expected = gradients(fused)
    for parameter, gradient in gradients(plain).items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-3, atol=1e-5, msg=parameter)


def plain_loss(case: Case, draft: DraftModel, samples: list) -> torch.Tensor:
    batch = case.method.batcher(case.options, case.config, seed=SEED).collate(samples)
    names = ("input_ids", "loss_mask", "hidden_states", "anchors", "block_keep", "last_hidden_state")
    inputs = {name: getattr(batch, name) for name in names}
    assert inputs["hidden_states"].shape[-1] == len(case.capture.layers) * HIDDEN
    if case.method.name == "dspark":
        return eager_dspark(draft, inputs, case.options.loss)
    return eager_dflash(draft, inputs, gamma=default_gamma(case.config.block_size)).loss
