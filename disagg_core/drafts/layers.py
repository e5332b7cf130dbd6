"""Layers that drafts of every method are built from."""

from __future__ import annotations

from typing import Any

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
        normed: Tensor
        full = x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64)
        if full and x.device.type == "cpu" and not torch.compiler.is_compiling():
            normed = _RmsNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        else:
            normed = F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
        return normed


class _RmsNorm(torch.autograd.Function):
    """``x / rms(x) * weight``, which keeps its input and a number for each row; torch's on a CPU keeps much more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed: Tensor = (x * scale).mul_(weight)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        by_weight = torch.einsum("nd,nd->d", grads[0].flatten(0, -2), normed.flatten(0, -2))
        by_normed = grads[0] * weight
        inner = torch.linalg.vecdot(by_normed, normed).div_(x.shape[-1]).unsqueeze(-1)
        return by_normed.sub_(normed.mul_(inner)).mul_(scale), by_weight, None


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
