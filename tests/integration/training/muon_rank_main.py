"""Child of the test of Muon on several ranks: some updates from the same gradients; rank 0 saves what comes of them."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from disagg_core.training.distributed import Ranks, shard
from disagg_core.training.muon import Muon
from disagg_core.training.optimizer import update_unless

STEPS = 4
FAULTY = 2
"""The step whose gradient is not finite."""


def main(folder: Path) -> None:
    """Run one rank."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with Ranks.join("cpu") as ranks:
        module = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False))  # rows that no number divides
        shard(module, ranks, torch.float32)
        muon = Muon(module.parameters(), lr=1e-2, weight_decay=0.1, dtype=torch.float32)
        for number in range(STEPS):
            for parameter in module.parameters():
                assert isinstance(parameter, DTensor)
                whole = torch.randn(parameter.shape) / (number != FAULTY)
                parameter.grad = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
            update_unless(torch.tensor(float(number == FAULTY)), muon)
        found = {name: _whole(parameter) for name, parameter in module.named_parameters()}
        states = {n: _whole(muon.state[p]["momentum_buffer"]) for n, p in module.named_parameters()}
        if ranks.is_first:
            save_file({**found, **{f"{n}.momentum_buffer": s for n, s in states.items()}}, folder / f"{ranks.size}")


def _whole(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor().detach().contiguous()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
