"""Muon (https://kellerjordan.github.io/posts/muon/): momentum whose direction is made orthogonal, for hidden matrices.

PyTorch's own Muon has whole matrices, takes its step at once, and computes in bf16. Here a matrix may be one of which
every rank has some rows, and a step may have to be left out without the host's knowledge. So momentum is kept by rows;
it is gathered, made orthogonal as PyTorch does it, and each rank applies its rows of what comes of it. All ranks
compute the same direction from the same gathered bits. The dtype is that of the rest of the step: bf16 would make 1e-3
of a direction out of the last bit of a gradient, which the order of sums over ranks decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from disagg_core.training.optimizer import OwnOptimizer
from disagg_core.training.rows import gathered, own_rows, rows_of

MOMENTUM = 0.95
"""Of Nesterov's momentum, as PyTorch's Muon has it by default."""
_ITERATIONS = 5
_FACTORS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5, as in the source above: five rounds bring any x from 0.002 to 1 to between 0.68 and 1.21."""
_LEAST_NORM = 1e-7


class Muon(OwnOptimizer):
    """Muon for matrices, whole ones or DTensors of which a rank has rows; with decoupled weight decay.

    Updates are scaled to the size of AdamW's (``match_rms_adamw``, https://arxiv.org/abs/2502.16982): learning rate and
    weight decay are the ones of AdamW. The state of a matrix is its ``momentum_buffer``, placed as the matrix is.
    Directions are computed in `dtype`.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], *, lr: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self._dtype = dtype

    def blank_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return a momentum of zeros."""
        return {"momentum_buffer": torch.zeros_like(parameter, memory_format=torch.preserve_format)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient. A collective where matrices are sharded."""
        assert closure is None
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._update(matrix, group["lr"], group["weight_decay"])

    def _update(self, matrix: nn.Parameter, rate: float, weight_decay: float) -> None:
        if not self.state[matrix]:
            self.state[matrix] = self.blank_state(matrix)
        assert matrix.grad is not None
        momentum = own_rows(self.state[matrix]["momentum_buffer"])
        rows, gradient = own_rows(matrix.detach()), own_rows(matrix.grad)
        moved = momentum.lerp(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(moved, MOMENTUM)
        direction = orthogonal(gathered(matrix, ahead), self._dtype).to(rows.dtype)
        size = 0.2 * math.sqrt(max(matrix.shape))  # numbers of an orthogonal direction are about 1 / sqrt(max(m, n))
        change = rows_of(direction * (-rate * size), matrix)
        updated = (rows * (1 - rate * weight_decay)).add_(change)
        if self.found_inf is not None:
            fault = self.found_inf != 0
            moved, updated = torch.where(fault, momentum, moved), torch.where(fault, rows, updated)
        momentum.copy_(moved)
        rows.copy_(updated)


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return about ``U V^T`` of ``matrix = U S V^T`` ``[m, n]``, in `dtype`, by Newton and Schulz's iteration.

    Singular values that were at least 0.002 of the matrix's norm come to lie between 0.68 and 1.21.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    near = (matrix.T if tall else matrix).to(dtype)
    near = near / near.norm().clamp(min=_LEAST_NORM)
    once, cubed, fifth = _FACTORS
    for _ in range(_ITERATIONS):
        squares = near @ near.T
        near = torch.addmm(near, torch.addmm(squares, squares, squares, beta=cubed, alpha=fifth), near, beta=once)
    return near.T if tall else near
