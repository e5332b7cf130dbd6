"""Matrix products of drafts: fp32 on CPU through oneDNN, everything else as torch does it.

Torch sends fp32 products on CPU to MKL, which runs at half speed on processors that are not Intel's; oneDNN has the
same precision and uses AVX-512 on all of them (measured: 100 against 220 GFLOP/s on one core of an EPYC 9005).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn_fits(*operands: Tensor) -> bool:
    return (
        _ONEDNN
        and not torch.compiler.is_compiling()
        and all(x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0 for x in operands)
    )


def _packed(x: Tensor) -> Tensor:
    """Return `x`, copied if neither it nor its transpose is contiguous: oneDNN has only a slow path for that."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` for ``[m, k]`` and ``[k, n]`` of one dtype; not recorded by autograd on the oneDNN path."""
    if _onednn_fits(a, b):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(_packed(a), _packed(b).t(), None, "none", [], "")
        return result
    return torch.mm(a, b)


def wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``a @ b`` in `dtype`; on CUDA a half-precision product is written in fp32 without rounding between."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return product(a, b).to(dtype)


def bounded_(logits: Tensor, cap: float | None) -> Tensor:
    """Return `logits` of any shape as ``cap * tanh(logits / cap)``, in the same memory; without a cap as they are."""
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a.T @ b`` for ``[m, k]`` and ``[m, n]``; oneDNN copies the operand that it takes transposed, so the
    narrower one is."""
    return product(a.t(), b) if a.shape[1] <= b.shape[1] else product(b.t(), a).t()


class _LinearRows(torch.autograd.Function):
    """``x @ weight.T`` for rows; keeps only its two inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        grad_x = product(grad, weight) if ctx.needs_input_grad[0] else None
        grad_weight = outer(grad, x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T`` for ``x`` ``[..., in]`` and ``weight`` ``[out, in]``; differentiable."""
    if not _onednn_fits(x, weight):
        return F.linear(x, weight)
    flat: Tensor = _LinearRows.apply(x.reshape(-1, x.shape[-1]), weight)  # type: ignore[no-untyped-call]
    return flat.view(*x.shape[:-1], weight.shape[0])


class Linear(nn.Linear):
    """`nn.Linear` without bias whose product goes through `linear`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``[..., out]`` for ``[..., in]``."""
        return linear(input, self.weight)
