"""What trains a draft's parameters: AdamW for all of them, or Muon for its matrices and AdamW for the rest.

Either may have its state in host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from disagg_core.drafts.matrices import hidden_matrices
from disagg_core.drafts.method import DraftModel
from disagg_core.run_spec.document import TrainingSection
from disagg_core.training.distributed import compute_dtype
from disagg_core.training.muon import Muon
from disagg_core.training.offload import Offloaded
from disagg_core.training.optimizer import OwnOptimizer, blank_state, build_optimizer, update_unless


class Optimizers(OwnOptimizer):
    """Several optimizers, each of other parameters, as one: with the groups and the state of all of them."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self._part_of = {parameter: part for part in parts for parameter in _parameters(part)}
        super().__init__(list(self._part_of), {})
        self._parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]
        for part in parts:
            part.state = self.state

    def blank_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Return what the optimizer of `parameter` begins with."""
        return blank_state(self._part_of[parameter], parameter)

    def settle(self) -> None:
        """Wait for the state of all of them."""
        for part in self._parts:
            if isinstance(part, OwnOptimizer):
                part.settle()

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Let each of them take its step."""
        assert closure is None
        for part in self._parts:
            if self.found_inf is None:
                part.step()
            else:
                update_unless(self.found_inf, part)


def optimizer_for(draft: DraftModel, section: TrainingSection, device: torch.device) -> torch.optim.Optimizer:
    """Return what trains the parameters of `draft`, fp32 masters on `device`, as `section` says."""
    trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    chosen = hidden_matrices(draft) if section.optimizer == "muon" else set()
    parts: list[torch.optim.Optimizer] = [build_optimizer((p for p in trained if p not in chosen), section)]
    if matrices := [parameter for parameter in trained if parameter in chosen]:
        dtype = compute_dtype(section.precision, device)
        parts.append(Muon(matrices, lr=section.learning_rate, weight_decay=section.weight_decay, dtype=dtype))
    if section.optimizer_offload:
        return Optimizers([Offloaded(part, device) for part in parts])
    return Optimizers(parts) if len(parts) > 1 else parts[0]


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
