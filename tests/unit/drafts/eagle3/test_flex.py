"""The attention of packed samples that a GPU runs computes what the chunked one does."""

from __future__ import annotations

import copy

import pytest
import torch

from disagg_core.drafts.eagle3 import training_time_test
from disagg_core.drafts.eagle3.batch import plan_step, step_mask
from disagg_core.drafts.eagle3.flex import document_mask
from tests.unit.drafts.eagle3.cases import gradients, small_batch, small_draft, target_head, worst_gradient

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("ttt_length", [1, 4])
def test_the_flex_kernel_computes_the_loss_of_the_chunked_one(ttt_length: int) -> None:
    """Without gradients: PyTorch has no backward pass of FlexAttention for CPUs."""
    draft = small_draft(head_dim=16)
    batch = small_batch(draft, [40, 7, 23])
    with torch.no_grad():
        chunked, flex = (
            training_time_test(draft, batch, lm_head=target_head(draft), ttt_length=ttt_length, attention=attention)
            for attention in ("chunked", "flex")
        )

    torch.testing.assert_close(flex.step_losses, chunked.step_losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(flex.accepted, chunked.accepted, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("ttt_length", [1, 4])
def test_the_flex_kernel_has_the_gradients_of_the_chunked_one(ttt_length: int) -> None:
    draft = small_draft(head_dim=16)
    batch = small_batch(draft, [40, 7, 23])
    expected = training_time_test(draft, batch, lm_head=target_head(draft), ttt_length=ttt_length)
    there = copy.deepcopy(draft).to("cuda")
    head, moved = target_head(draft).to("cuda"), {name: tensor.to("cuda") for name, tensor in batch.items()}

    found = training_time_test(there, moved, lm_head=head, ttt_length=ttt_length, attention="flex")

    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-3)
    theirs = {name: gradient.cpu() for name, gradient in gradients(there, found.total).items()}
    assert worst_gradient(theirs, gradients(draft, expected.total)) < 1e-2


def test_the_pattern_skips_the_tiles_between_samples() -> None:
    """Two samples of some tiles each: no tile of the one's rows by the other's keys is computed."""
    mask = torch.ones(2, 512, dtype=torch.bool)
    plan = plan_step(step_mask(mask, mask, "aligned"), mask, 1, torch.device("cpu"), every_row=True, dense=False)

    pattern = document_mask(plan)

    computed = pattern.to_dense()[0, 0]  # [row tiles, key tiles], 128 wide
    own = torch.tril(torch.ones(4, 4, dtype=computed.dtype))
    assert torch.equal(computed, torch.block_diag(own, own).to(computed.dtype))
