"""Layers that drafts of every method are built from."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disagg_core.drafts.linear import Linear


class RMSNorm(nn.Module):
    """Root-mean-square norm with a scale, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of ``x`` ``[..., size]``."""
        normed: Tensor = F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return normed


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, without biases."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden, inner)
        self.up_proj = Linear(hidden, inner)
        self.down_proj = Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., H]`` for ``x`` ``[..., H]``."""
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output
