"""State in host memory gives the same bits as state on the device, whatever the chunks it travels in."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from disagg_core.run_spec.document import TrainingSection
from disagg_core.training.distributed import Ranks, shard
from disagg_core.training.muon import Muon
from disagg_core.training.offload import CHUNK_BYTES, Offloaded
from disagg_core.training.optimizer import build_optimizer, update_unless
from disagg_core.training.optimizers import Optimizers
from disagg_core.training.rows import own_rows
from disagg_core.training.state import optimizer_tensors

pytestmark = pytest.mark.unit

SECTION = TrainingSection(learning_rate=1e-2, weight_decay=0.1)
GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)
Wrap = Callable[[torch.optim.Optimizer], torch.optim.Optimizer]


def plain(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return optimizer


def trained(ranks: Ranks, wrap: Wrap, *, faulty: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Some steps of a sharded module, one of which has a fault; return weights and optimizer state."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(4, 2)).to(ranks.device)
    shard(module, ranks, torch.float32)
    matrices, vectors = ([p for p in module.parameters() if p.dim() == size] for size in (2, 1))
    muon = Muon(matrices[:1], lr=1e-2, weight_decay=0.1, dtype=torch.float32)
    together = Optimizers([wrap(build_optimizer([*matrices[1:], *vectors], SECTION)), wrap(muon)])
    for number in range(5):
        inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(number)).to(ranks.device)
        module(inputs).square().sum().backward()
        update_unless(torch.tensor(float(number == faulty), device=ranks.device), together)
        together.zero_grad(set_to_none=True)
    return copies(dict(module.named_parameters()).items()), copies(optimizer_tensors(module, together).items())


def copies(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: own_rows(tensor.detach()).to("cpu", copy=True) for name, tensor in tensors}


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("chunk_bytes", [1, 200, CHUNK_BYTES])
def test_updates_have_the_same_bits(device: str, chunk_bytes: int) -> None:
    with Ranks.join("cuda" if device == "cuda" else "cpu") as ranks:
        expected = trained(ranks, plain)
        found = trained(ranks, lambda inner: Offloaded(inner, ranks.device, chunk_bytes=chunk_bytes))

    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_state_is_in_page_locked_host_memory_and_leaves_the_device() -> None:
    rows = 1024
    with Ranks.join("cuda") as ranks:
        weights = [nn.Parameter(torch.ones(rows, rows, device=ranks.device)) for _ in range(8)]
        offloaded = Offloaded(build_optimizer(weights, SECTION), ranks.device, chunk_bytes=2 * 4 * rows * rows)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        before = torch.cuda.memory_allocated()

        offloaded.step()

        offloaded.settle()
        for weight in weights:
            moment = offloaded.state[weight]["exp_avg"]
            assert moment.is_pinned()
            assert moment.device.type == "cpu"
            assert float(moment[0, 0]) == pytest.approx(1 - SECTION.betas[0])
        taken = torch.cuda.memory_allocated() - before
        assert taken <= 2 * 2 * 4 * rows * rows + 2**20, "more than two buffers of one parameter's state"
