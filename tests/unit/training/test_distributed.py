"""What the trainer's ranks promise when there is only one, and which dtype and device they choose."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from disagg_core.errors import BadInput
from disagg_core.training.distributed import Ranks, choose_device, compute_dtype, shard
from disagg_core.training.optimizer import clip_gradients
from disagg_core.training.state import gather_weights

pytestmark = pytest.mark.unit


def test_a_plain_process_becomes_the_only_rank_and_cleans_up():
    with Ranks.join("cpu") as ranks:
        assert (ranks.rank, ranks.size, ranks.is_first) == (0, 1, True)
        assert ranks.broadcast(b"refs") == b"refs"
        assert ranks.sum([1, 2.5]) == [1.0, 2.5]
        assert ranks.gather(b"mine") == [b"mine"]
    assert not dist.is_initialized()


def test_a_process_group_that_exists_is_left_alone():
    with Ranks.join("cpu"):
        with Ranks.join("cpu") as inner:
            assert not inner.owns_group
        assert dist.is_initialized()


def test_bf16_is_chosen_only_where_it_is_fast():
    cpu = torch.device("cpu")
    assert compute_dtype("auto", cpu) == torch.float32
    assert compute_dtype("bfloat16", cpu) == torch.bfloat16
    assert compute_dtype("float32", cpu) == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(BadInput, match="needs a CUDA device of its own, found 0"):
        choose_device("cuda")


def test_frozen_parameters_stay_whole_and_trained_ones_are_fp32_masters():
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    module[1].requires_grad_(False)
    before = module[0].weight.detach().clone()
    with Ranks.join("cpu") as ranks:
        shard(module, ranks, torch.float32)

        assert isinstance(module[0].weight, DTensor)
        assert module[0].weight.dtype == torch.float32
        assert not isinstance(module[1].weight, DTensor)
        saved = gather_weights(module, module.state_dict())
        assert saved.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
        assert torch.equal(saved["0.weight"], before)
        module[0].weight.data.add_(1)
        assert torch.equal(saved["0.weight"], before), "what was gathered is a copy"
        assert module(torch.ones(3, 4)).shape == (3, 2)


def test_the_global_norm_counts_every_shard():
    layer = nn.Linear(3, 3, bias=False)
    with Ranks.join("cpu") as ranks:
        shard(layer, ranks, torch.float32)
        layer(torch.ones(1, 3)).sum().backward()

        assert float(clip_gradients(layer.parameters(), 0.5)) == pytest.approx(3.0)
        assert float(layer.weight.grad.full_tensor().norm()) == pytest.approx(0.5, rel=1e-4)
