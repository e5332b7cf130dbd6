"""Muon (https://kellerjordan.github.io/posts/muon/): momentum whose direction is made orthogonal, for hidden matrices.

PyTorch's own Muon makes whole matrices orthogonal and takes its step at once. Here a matrix may be one of which every
rank has some rows, and a step may have to be left out without the host's knowledge. So momentum is kept by rows; the
matrix is gathered for PyTorch's Muon, which does the rest; and each rank applies its rows of what comes of it. All
ranks compute the same direction from the same gathered bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from disagg_core.training.optimizer import OwnOptimizer
from disagg_core.training.rows import gathered, own_rows, rows_of

MOMENTUM = 0.95
"""Of Nesterov's momentum, as PyTorch's Muon has it by default."""


class Muon(OwnOptimizer):
    """Muon for matrices, whole ones or DTensors of which a rank has rows; with decoupled weight decay.

    Updates are scaled to the size of AdamW's (``match_rms_adamw``, https://arxiv.org/abs/2502.16982): learning rate and
    weight decay are the ones of AdamW. The state of a matrix is its ``momentum_buffer``, placed as the matrix is.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

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
        change = rows_of(_orthogonal_step(gathered(matrix, ahead), rate), matrix)
        updated = (rows * (1 - rate * weight_decay)).add_(change)
        if self.found_inf is not None:
            fault = self.found_inf != 0
            moved, updated = torch.where(fault, momentum, moved), torch.where(fault, rows, updated)
        momentum.copy_(moved)
        rows.copy_(updated)


def _orthogonal_step(ahead: Tensor, rate: float) -> Tensor:
    """Return what PyTorch's Muon adds to a whole matrix for the momentum `ahead` ``[m, n]``, without weight decay."""
    added = nn.Parameter(torch.zeros_like(ahead))
    added.grad = ahead
    muon = torch.optim.Muon(
        [added], lr=rate, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="match_rms_adamw"
    )
    muon.step()  # type: ignore[no-untyped-call]
    return added.detach()
