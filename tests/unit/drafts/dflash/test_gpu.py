"""The step in bf16, as a GPU runs it with FlexAttention, beside the same step in fp32 on the CPU.

The comparison itself runs on the CPU too, where it holds bf16 to the same bounds with the gathered attention.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from disagg_core.drafts.dflash import DFlashDraft, dflash_loss
from disagg_core.drafts.dflash2.loss import dflash2_loss
from disagg_core.drafts.dflash2.model import DFlash2Draft
from tests.unit.drafts.dflash.cases import KINDS, blocks_of, gradients, small_batch, small_draft, target_parts
from tests.unit.drafts.dflash2.cases import small_draft2

GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)

pytestmark = [pytest.mark.unit, pytest.mark.parametrize("device", ["cpu", GPU])]
WIDE = {"hidden_size": 64, "head_dim": 16, "block_size": 8}


def tamed(draft: DFlashDraft) -> DFlashDraft:
    """Weights that keep the size of what passes through, and logits with a deviation of about 2."""
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            if parameter.requires_grad and parameter.dim() == 2 and "codebook" not in name:
                parameter.mul_(1 / (0.3 * parameter.shape[-1] ** 0.5))
    parts = target_parts(draft.config)
    draft.attach(type(parts)(parts.embedding, parts.lm_head * 0.35))
    return draft


@pytest.mark.parametrize("kind", [*KINDS.values(), "dflash2"], ids=[*KINDS, "dflash2"])
@pytest.mark.parametrize("lengths", [[64], [40, 33, 7]])
def test_bf16_stays_near_fp32(device: str, lengths: list[int], kind: Any) -> None:
    window = {"sliding_window": 12} if kind != "dflash2" and "sliding_window" in kind else {}
    draft = tamed(small_draft2(**WIDE) if kind == "dflash2" else small_draft(**{**WIDE, **kind, **window}))
    batch = small_batch(draft.config, lengths, anchors=12)
    run: Any = dflash2_loss if isinstance(draft, DFlash2Draft) else dflash_loss
    expected = run(draft, batch, **blocks_of(batch))
    half = copy.deepcopy(draft).to(device, torch.bfloat16)
    moved = {**batch, "hidden_states": batch["hidden_states"].to(device, torch.bfloat16)}
    found = run(half, moved, **blocks_of(batch))
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)
    pairs = zip(gradients(half, found.loss).values(), gradients(draft, expected.loss).values(), strict=True)
    flat = [torch.cat(side) for side in zip(*((a.float().cpu().flatten(), b.flatten()) for a, b in pairs), strict=True)]
    assert float(torch.cosine_similarity(*flat, dim=0)) >= 0.99


def test_float16_is_no_worse(device: str) -> None:
    draft = tamed(small_draft(**WIDE))
    batch = small_batch(draft.config, [40, 33, 7], anchors=12)
    expected = dflash_loss(draft, batch, **blocks_of(batch)).loss
    half = copy.deepcopy(draft).to(device, torch.float16)
    moved = {**batch, "hidden_states": batch["hidden_states"].to(device, torch.float16)}
    assert dflash_loss(half, moved, **blocks_of(batch)).loss.item() == pytest.approx(expected.item(), rel=0.02)
