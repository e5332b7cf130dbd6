"""The draft's weights and the optimizer's state as tensors by name.

What is sharded stays sharded, as DTensors, of which a checkpoint takes each rank's rows. Names are those of the draft's
``state_dict``, which are its serving names too. They do not depend on the number of ranks, so any number of ranks can
load what another number saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from disagg_core.training.optimizer import OwnOptimizer, blank_state

_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def gather_weights(module: nn.Module, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the tensors called as those of `own`, whole and on the CPU, on rank 0; nothing on the others.

    A collective. `own` is the part of `module`'s state dict that is asked for; frozen tensors are whole in it already.
    """
    trained = cast(dict[str, Tensor], get_model_state_dict(module, options=_GATHERED))
    if not trained:
        return {}
    # A copy, because the gathered tensor of a single rank on the CPU is the parameter itself.
    return {name: trained.get(name, tensor).detach().to("cpu", copy=True).contiguous() for name, tensor in own.items()}


def optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of `optimizer`, over the trained parameters of `module`, itself, called <parameter>.<state>.

    Empty before its first step.
    """
    if not optimizer.state:
        return {}
    if isinstance(optimizer, OwnOptimizer):
        optimizer.settle()
    return {
        f"{name}.{kind}": tensor
        for name, parameter in _trained(module)
        for kind, tensor in optimizer.state[parameter].items()
    }


def prepared_optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what `optimizer_tensors` does, with a state of zeros where there is none: to load a saved one into."""
    for _, parameter in _trained(module):
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = blank_state(optimizer, parameter)
    return optimizer_tensors(module, optimizer)


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
