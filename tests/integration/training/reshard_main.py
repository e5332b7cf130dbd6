"""Child of the test of resharding: rank 0 saves, after a step, what the ranks hold; or all load it and compare."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor

from disagg_core.run_spec.document import TrainingSection
from disagg_core.training.distributed import Ranks, shard
from disagg_core.training.optimizer import build_optimizer
from disagg_core.training.state import gather_optimizer, gather_weights, restore_optimizer, restore_weights


def main(what: str, folder: Path) -> None:
    """Run one rank; `what` is save or load."""
    with Ranks.join("cpu") as ranks:
        torch.manual_seed(0 if what == "save" else 1)
        module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))  # rows that no number of ranks divides
        module[1].requires_grad_(False)
        shard(module, ranks, torch.float32)
        optimizer = build_optimizer((p for p in module.parameters() if p.requires_grad), TrainingSection())
        if what == "save":
            module(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            weights, state = gather_weights(module, module.state_dict()), gather_optimizer(module, optimizer)
            if ranks.is_first:
                save_file(weights, folder / "weights.safetensors")
                save_file(state, folder / "optimizer.safetensors")
            else:
                assert (weights, state) == ({}, {})
            return
        weights, state = load_file(folder / "weights.safetensors"), load_file(folder / "optimizer.safetensors")
        restore_weights(module, module.state_dict(), weights)
        restore_optimizer(module, optimizer, state)
        assert len(optimizer.state) == 2
        for name, parameter in module.named_parameters():
            assert torch.equal(_whole(parameter), weights[name]), name
            for kind, value in optimizer.state.get(parameter, {}).items():
                assert torch.equal(_whole(value), state[f"{name}.{kind}"]), (name, kind)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
