"""The step in bf16, as a GPU runs it, beside the same step in fp32 on the CPU.

The comparison itself runs on the CPU too, where it holds `bf16` to the same bounds with the chunked attention.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from disagg_core.drafts.eagle3 import Eagle3Draft, training_time_test
from tests.unit.drafts.eagle3.cases import gradients, small_batch, small_draft, target_head

GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)

pytestmark = [pytest.mark.unit, pytest.mark.parametrize("device", ["cpu", GPU])]


def wide_draft(**changes: int) -> Eagle3Draft:
    """A draft that the fused kernels take, with weights that keep the size of what passes through."""
    draft = small_draft(hidden_size=64, head_dim=16, **changes)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if "norm" not in name:
                parameter.mul_(1 / (0.3 * parameter.shape[-1] ** 0.5))
    return draft


def head_of(draft: Eagle3Draft) -> Tensor:
    """A target's head whose logits have a deviation of about 2."""
    return target_head(draft) * 0.35


def on(device: str, draft: Eagle3Draft, batch: dict[str, Tensor]) -> tuple[Eagle3Draft, dict[str, Tensor]]:
    """The same weights and the same sample there, in bf16."""
    moved = {name: x.to(device, torch.bfloat16 if x.is_floating_point() else x.dtype) for name, x in batch.items()}
    return copy.deepcopy(draft).to(device, torch.bfloat16), moved


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, {"num_key_value_heads": 4}])
@pytest.mark.parametrize("lengths", [[64], [40, 33, 7]])
def test_bf16_stays_near_fp32(device: str, lengths: list[int], changes: dict[str, int]) -> None:
    draft = wide_draft(**changes)
    batch = small_batch(draft, lengths)
    expected = training_time_test(draft, batch, lm_head=head_of(draft), ttt_length=5)
    half, moved = on(device, draft, batch)
    found = training_time_test(half, moved, lm_head=head_of(draft).to(device), ttt_length=5)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=0.02)
    for one, other in zip(found.step_losses, expected.step_losses, strict=True):
        assert one.item() == pytest.approx(other.item(), rel=0.02)
    pairs = zip(gradients(half, found.total).values(), gradients(draft, expected.total).values(), strict=True)
    flat = [torch.cat(side) for side in zip(*((a.float().cpu().flatten(), b.flatten()) for a, b in pairs), strict=True)]
    assert float(torch.cosine_similarity(*flat, dim=0)) >= 0.99


def test_the_fused_kernel_and_the_chunks_agree(device: str) -> None:
    draft = wide_draft()
    half, batch = on(device, draft, small_batch(draft, [50, 21]))
    head = head_of(draft).to(device)
    found = [
        training_time_test(half, batch, lm_head=head, ttt_length=5, attention=kernel) for kernel in ("flash", "chunked")
    ]
    assert found[0].total.item() == pytest.approx(found[1].total.item(), rel=0.01)
