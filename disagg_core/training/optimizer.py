"""AdamW on fp32 masters and its learning-rate schedule.

The schedule is a function of the step alone, so resuming needs no scheduler state.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from disagg_core.run_spec.document import TrainingSection

WARMUP_STEPS_OF_UNKNOWN_LENGTH = 100
"""Warm-up steps when the number of optimizer steps is not known beforehand."""

NamedParameters = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak`, then half a cosine to 0 at `total_steps`; constant after warm-up if that is None.

    Steps beyond the last one, which samples that were lost and captured again need, have the last one's rate: at 0 they
    would count as trained and change nothing.
    """

    peak: float
    warmup_ratio: float
    total_steps: int | None

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up; the first of them has rate peak / warmup_steps."""
        if self.total_steps is None:
            return WARMUP_STEPS_OF_UNKNOWN_LENGTH if self.warmup_ratio else 0
        return int(self.warmup_ratio * self.total_steps)

    def at(self, step: int) -> float:
        """Return the learning rate of optimizer step `step` (0-based)."""
        warmup = self.warmup_steps
        if step < warmup:
            return self.peak * (step + 1) / warmup
        if self.total_steps is None:
            return self.peak
        last = max(warmup, self.total_steps - 1)
        progress = (min(step, last) - warmup) / max(1, self.total_steps - warmup)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * progress))


class OwnOptimizer(torch.optim.Optimizer, ABC):
    """What the optimizers of this package add to PyTorch's."""

    found_inf: Tensor | None = None
    """Scalar on the device; where it is 1, a step leaves all as it is. See `update_unless`."""

    @abstractmethod
    def blank_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return the state of zeros that the optimizer begins with for `parameter`."""

    def settle(self) -> None:
        """Wait until the host can read the state, as far as it lies in the host's memory."""


def blank_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the state of zeros that `optimizer`, one of this package or AdamW, begins with for `parameter`."""
    if isinstance(optimizer, OwnOptimizer):
        return optimizer.blank_state(parameter)
    assert isinstance(optimizer, torch.optim.AdamW)
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def build_optimizer(parameters: Iterable[nn.Parameter], section: TrainingSection) -> torch.optim.AdamW:
    """Return AdamW (decoupled weight decay) over `parameters`, which must be fp32."""
    masters = list(parameters)
    wrong = {str(p.dtype) for p in masters if p.dtype != torch.float32}
    assert not wrong, f"optimizer state is kept on fp32 masters, found {wrong}"
    return torch.optim.AdamW(
        masters, lr=section.learning_rate, betas=section.betas, weight_decay=section.weight_decay, fused=True
    )


def update_unless(fault: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Let `optimizer` take its step, or leave all as it is where `fault` is 1, without a host's look.

    Args:
        fault: fp32 scalar on the parameters' device, 0 or 1.
        optimizer: one that looks at it on the device; fused AdamW does inside its kernel, as for gradient scaling.
    """
    optimizer.found_inf = fault  # type: ignore[attr-defined]  # read by fused optimizers, which GradScaler sets it for
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients so that their norm over all parameters and ranks is at most `max_norm`.

    Returns the norm before clipping, a scalar on the parameters' device. A collective when parameters are sharded.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
