"""The optimizer follows the written schedule and can be taken apart and put together again."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from disagg_core.errors import CheckpointError
from disagg_core.run_spec.document import TrainingSection
from disagg_core.training.checkpoint import load_into
from disagg_core.training.distributed import Ranks
from disagg_core.training.optimizer import (
    WARMUP_STEPS_OF_UNKNOWN_LENGTH,
    Schedule,
    build_optimizer,
    clip_gradients,
    update_unless,
)
from disagg_core.training.state import optimizer_tensors, prepared_optimizer_tensors

pytestmark = pytest.mark.unit


def test_the_rate_climbs_linearly_and_falls_as_half_a_cosine_towards_zero():
    schedule = Schedule(peak=2.0, warmup_ratio=0.1, total_steps=100)

    assert schedule.at(0) == pytest.approx(0.2)
    assert schedule.at(9) == pytest.approx(2.0)
    assert schedule.at(10) == pytest.approx(2.0)
    assert schedule.at(55) == pytest.approx(1.0)
    assert schedule.at(99) == pytest.approx(1 + math.cos(math.pi * 89 / 90))


@pytest.mark.parametrize(("warmup", "total"), [(0.1, 100), (0.0, 100), (0.0, 1), (0.9, 10), (0.0, 2)])
def test_steps_beyond_the_last_one_train_at_its_rate_and_never_at_none(warmup, total):
    """Samples that were lost and captured again come after the planned steps."""
    schedule = Schedule(peak=2.0, warmup_ratio=warmup, total_steps=total)

    assert schedule.at(total - 1) > 0
    assert schedule.at(total) == schedule.at(10 * total) == schedule.at(total - 1)


def test_the_schedule_is_what_torch_computes():
    schedule = Schedule(peak=1e-3, warmup_ratio=0.05, total_steps=60)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / 3, total_iters=2)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=57)
    expected = []
    for step in range(60):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        warm.step() if step < 3 else cosine.step()

    assert schedule.warmup_steps == 3
    assert [schedule.at(step) for step in range(60)] == pytest.approx(expected, rel=1e-9)


def test_without_a_known_end_the_rate_stays_constant_after_warm_up():
    schedule = Schedule(peak=1.0, warmup_ratio=0.015, total_steps=None)

    assert schedule.at(0) == 1.0 / WARMUP_STEPS_OF_UNKNOWN_LENGTH
    assert schedule.at(WARMUP_STEPS_OF_UNKNOWN_LENGTH) == schedule.at(10**6) == 1.0


def test_without_warm_up_the_first_step_has_the_peak_rate():
    assert Schedule(peak=3.0, warmup_ratio=0.0, total_steps=10).at(0) == 3.0
    assert Schedule(peak=3.0, warmup_ratio=0.0, total_steps=None).at(0) == 3.0


def test_gradients_are_clipped_to_the_global_norm():
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4))]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)

    norm = clip_gradients(parameters, 0.5)

    assert float(norm) == pytest.approx(2 * math.sqrt(7))
    assert float(torch.cat([p.grad for p in parameters]).norm()) == pytest.approx(0.5, rel=1e-4)


def trained(steps: int, resume_after: int | None = None) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    optimizer = build_optimizer(layer.parameters(), TrainingSection(learning_rate=1e-2))
    for step in range(steps):
        if step == resume_after:
            saved = {name: tensor.clone() for name, tensor in optimizer_tensors(layer, optimizer).items()}
            optimizer = build_optimizer(layer.parameters(), TrainingSection(learning_rate=1e-2))
            for name, tensor in prepared_optimizer_tensors(layer, optimizer).items():
                tensor.copy_(saved[name])
        optimizer.zero_grad()
        layer(torch.randn(2, 5, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return layer


def test_a_restored_optimizer_goes_on_bit_for_bit():
    with Ranks.join("cpu"):
        assert torch.equal(trained(6).weight, trained(6, resume_after=3).weight)


def test_asking_an_optimizer_for_its_state_before_its_first_step_leaves_it_alone():
    layer = nn.Linear(5, 3)
    optimizer = build_optimizer(layer.parameters(), TrainingSection())

    assert optimizer_tensors(layer, optimizer) == {}
    assert not optimizer.state


def test_a_state_that_does_not_fit_is_named(tmp_path):
    layer = nn.Linear(5, 3)
    optimizer = build_optimizer(layer.parameters(), TrainingSection())
    layer(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    state = optimizer_tensors(layer, optimizer)
    assert state.keys() == {
        f"{name}.{kind}" for name in ("weight", "bias") for kind in ("exp_avg", "exp_avg_sq", "step")
    }

    save_file({name: value for name, value in state.items() if name != "bias.exp_avg"}, tmp_path / "without")
    with pytest.raises(CheckpointError, match=r"optimizer state: missing \['without:bias.exp_avg'\]"):
        load_into(tmp_path, "without", state, "optimizer state")
    save_file(state | {"weight.exp_avg": torch.zeros(5, 3)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"weight.exp_avg: expected shape \[3, 5\], found \[5, 3\]"):
        load_into(tmp_path, "other", state, "optimizer state")


def test_a_step_with_a_fault_leaves_weights_and_moments_and_the_next_one_goes_on_from_them():
    """The same bits as if the step had never been asked for, whatever its gradient was."""
    torch.manual_seed(0)
    start, gradients = torch.randn(3, 4), torch.randn(3, 3, 4)
    section = TrainingSection(learning_rate=1e-2, weight_decay=0.1)
    kept = []
    for bad in (None, 1):
        weight = nn.Parameter(start.clone())
        optimizer = build_optimizer([weight], section)
        for number, gradient in enumerate(gradients):
            if number == bad:
                weight.grad = torch.full_like(weight, float("nan"))
                update_unless(torch.tensor(1.0), optimizer)
            weight.grad = gradient.clone()
            update_unless(torch.tensor(0.0), optimizer)
        kept.append([weight.detach(), *optimizer.state[weight].values()])

    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))


def test_a_step_without_a_fault_is_a_plain_step():
    torch.manual_seed(0)
    start, gradient = torch.randn(3, 4), torch.randn(3, 4)
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [build_optimizer([weight], TrainingSection()) for weight in weights]
    for weight in weights:
        weight.grad = gradient.clone()

    optimizers[0].step()
    update_unless(torch.tensor(0.0), optimizers[1])

    assert torch.equal(*weights)
