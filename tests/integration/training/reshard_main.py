"""Child of the test of resharding: the ranks save, after a step, what they hold; or all load it and compare.

Arguments: save or load, the checkpoints' directory, and how the module is trained: by adamw, by muon beside AdamW, or
offloaded, by AdamW with its state in host memory.
"""

import sys
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from disagg_core.drafts.tensor_files import CHECKPOINT_WEIGHTS
from disagg_core.run_spec.document import TrainingSection
from disagg_core.training.checkpoint import (
    CheckpointContent,
    CheckpointSaver,
    DataCursor,
    DraftContent,
    DraftProgress,
    TrainerState,
    load_checkpoint,
    load_into,
)
from disagg_core.training.checkpoint.document import OPTIMIZER_FILE
from disagg_core.training.distributed import Ranks, shard
from disagg_core.training.muon import Muon
from disagg_core.training.offload import Offloaded
from disagg_core.training.optimizer import build_optimizer
from disagg_core.training.optimizers import Optimizers
from disagg_core.training.state import optimizer_tensors, prepared_optimizer_tensors


def main(what: str, folder: Path, how: str) -> None:
    """Run one rank."""
    with Ranks.join("cpu") as ranks:
        torch.manual_seed(0 if what == "save" else 1)
        module = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))  # rows that no number of ranks divides
        module[1].requires_grad_(False)
        shard(module, ranks, torch.float32)
        optimizer = optimizer_of(module, how, ranks.device)
        if what == "save":
            module(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            save(folder, module, optimizer, ranks)
            return
        load_into(folder / "step-1", CHECKPOINT_WEIGHTS, module.state_dict(), "weights", ranks.another_group())
        state = prepared_optimizer_tensors(module, optimizer)
        load_into(folder / "step-1", OPTIMIZER_FILE, state, "optimizer", ranks.another_group())
        assert len(optimizer.state) == 2
        saved = load_checkpoint(folder / "step-1").drafts[""]
        kind = "momentum_buffer" if how == "muon" else "exp_avg"
        assert not torch.equal(saved.optimizer[f"0.weight.{kind}"], torch.zeros(5, 4))
        for name, parameter in module.named_parameters():
            assert torch.equal(_whole(parameter), saved.weights[name]), name
            for kind, value in optimizer.state.get(parameter, {}).items():
                assert torch.equal(_whole(value), saved.optimizer[f"{name}.{kind}"]), (name, kind)


def optimizer_of(module: nn.Module, how: str, device: torch.device) -> torch.optim.Optimizer:
    """Return an optimizer of the parameters that are trained."""
    section = TrainingSection()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if how == "adamw":
        return build_optimizer(trained, section)
    if how == "offloaded":
        return Optimizers([Offloaded(build_optimizer(trained, section), device)])
    matrices, vectors = ([p for p in trained if p.dim() == size] for size in (2, 1))
    return Optimizers(
        [build_optimizer(vectors, section), Muon(matrices, lr=1e-3, weight_decay=0.0, dtype=torch.float32)]
    )


def save(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Save in the background while the weights and the optimizer's state change already."""
    before = {name: _whole(tensor).clone() for name, tensor in module.state_dict().items()}
    state = TrainerState(
        step=1,
        samples=0,
        tokens=0,
        seed=0,
        total_steps=None,
        identity={},
        cursor=DataCursor(),
        drafts={"": DraftProgress(step=1)},
    )
    tensors = optimizer_tensors(module, optimizer)
    content = DraftContent(module.state_dict(), {}, tensors, {"cpu": torch.get_rng_state()})
    saver = CheckpointSaver(folder, keep=1, group=ranks.another_group(), device=ranks.device)
    saver.start(CheckpointContent({"": content}, state))
    with torch.no_grad():
        for tensor in [*module.parameters(), *tensors.values()]:
            tensor.fill_(7.0)
    assert saver.take() == folder / "step-1"
    saver.close()
    saved = load_checkpoint(folder / "step-1").drafts[""]
    assert all(torch.equal(saved.weights[name], tensor) for name, tensor in before.items())
    assert not any(bool((tensor == 7.0).any()) for tensor in saved.optimizer.values())


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
