"""Layers of every draft beside torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from disagg_core.drafts.layers import RMSNorm

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 4, 12), (0, 12)])
def test_the_norm_is_torchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(12, 1e-6).double()
    torch.nn.init.normal_(norm.weight)
    results = []
    for ours in (True, False):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        norm.zero_grad()
        output = norm(x) if ours else F.rms_norm(x, (12,), norm.weight, 1e-6)
        (output * torch.arange(12)).sin().sum().backward()
        assert x.grad is not None
        assert norm.weight.grad is not None
        results.append((output.detach(), x.grad, norm.weight.grad.clone()))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
