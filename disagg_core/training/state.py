"""The draft's weights and the optimizer's state as whole tensors by name, however they are sharded.

`torch.distributed.checkpoint` gathers and shards. Names are those of the draft's ``state_dict``, which are its serving
names too. They do not depend on the number of ranks, so any number of ranks can load what another number saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from disagg_core.errors import CheckpointError

_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_WHOLE = StateDictOptions(full_state_dict=True, strict=False)  # not strict: what is the target's is in no checkpoint
_KINDS = ("exp_avg", "exp_avg_sq", "step")


def gather_weights(module: nn.Module, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the tensors called as those of `own`, whole and on the CPU, on rank 0; nothing on the others.

    A collective. `own` is the part of `module`'s state dict that is asked for; frozen tensors are whole in it already.
    """
    trained = cast(dict[str, Tensor], get_model_state_dict(module, options=_GATHERED))
    if not trained:
        return {}
    # A copy, because the gathered tensor of a single rank on the CPU is the parameter itself.
    return {name: trained.get(name, tensor).detach().to("cpu", copy=True).contiguous() for name, tensor in own.items()}


def restore_weights(module: nn.Module, own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Put the whole `tensors` into `module`, each rank its own shard; no communication.

    Raises:
        CheckpointError: a tensor is missing, unknown, or has another shape than that of `own`.
    """
    if own.keys() != tensors.keys():
        raise CheckpointError(
            f"draft tensors: missing {sorted(own.keys() - tensors.keys())}, "
            f"unknown {sorted(tensors.keys() - own.keys())}; the draft section of the run has changed"
        )
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            expected, found = list(tensor.shape), list(tensors[name].shape)
            raise CheckpointError(f"draft tensor {name}: expected shape {expected}, found {found}")
    set_model_state_dict(module, dict(tensors), options=_WHOLE)


def gather_optimizer(module: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return the optimizer's state as whole CPU tensors called <parameter>.<state>, on rank 0; nothing on the others.

    A collective. Empty before the first step: DCP would take a step of its own then, to have a state to show.
    """
    if not optimizer.state:
        return {}
    state = get_optimizer_state_dict(module, optimizer, options=_GATHERED).get("state", {})
    return {
        f"{name}.{kind}": value.contiguous()
        for name, kinds in cast(dict[str, dict[str, Tensor]], state).items()
        for kind, value in kinds.items()
    }


def restore_optimizer(module: nn.Module, optimizer: torch.optim.AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Put the state that `gather_optimizer` returned back; no communication. Hyperparameters stay as they are.

    Raises:
        CheckpointError: a state is missing, unknown, or has another shape than its parameter.
    """
    if not tensors:
        return
    parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    expected = {f"{name}.{kind}" for name in parameters for kind in _KINDS}
    if tensors.keys() != expected:
        raise CheckpointError(
            f"optimizer state: missing {sorted(expected - tensors.keys())}, unknown {sorted(tensors.keys() - expected)}"
        )
    for name, parameter in parameters.items():
        for kind in ("exp_avg", "exp_avg_sq"):
            found = tensors[f"{name}.{kind}"].shape
            if found != parameter.shape:
                raise CheckpointError(
                    f"optimizer state {name}.{kind}: expected shape {list(parameter.shape)}, found {list(found)}"
                )
    (group,) = optimizer.param_groups
    document: dict[str, Any] = {
        "state": {name: {kind: tensors[f"{name}.{kind}"] for kind in _KINDS} for name in parameters},
        "param_groups": [{**group, "params": list(parameters)}],
    }
    set_optimizer_state_dict(module, optimizer, document, options=_WHOLE)
