"""Muon takes PyTorch's step for matrices, and leaves it out where there is a fault."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from disagg_core.drafts.matrices import hidden_matrices
from disagg_core.drafts.registry import method_names
from disagg_core.run_spec.document import TrainingSection
from disagg_core.training.muon import MOMENTUM, Muon, orthogonal
from disagg_core.training.optimizer import build_optimizer, update_unless
from disagg_core.training.optimizers import Optimizers
from tests.contract.drafts.kit import Case

pytestmark = pytest.mark.unit

RATE = {"lr": 1e-2, "weight_decay": 0.1}
OURS = {**RATE, "dtype": torch.float32}


def gradients(count: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def stepped(optimizer: torch.optim.Optimizer, matrix: nn.Parameter, gradient: Tensor, fault: float = 0.0) -> None:
    matrix.grad = gradient.clone()
    update_unless(torch.tensor(fault), optimizer)


@pytest.mark.parametrize("shape", [(6, 4), (4, 9), (5, 5)])
def test_its_steps_are_those_of_torch(shape: tuple[int, int]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    muon = Muon([ours], **RATE, dtype=torch.bfloat16)
    reference = torch.optim.Muon([theirs], **RATE, momentum=MOMENTUM, nesterov=True, adjust_lr_fn="match_rms_adamw")

    for gradient in gradients(5, *shape):
        stepped(muon, ours, gradient)
        theirs.grad = gradient.clone()
        reference.step()

    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert torch.equal(muon.state[ours]["momentum_buffer"], reference.state[theirs]["momentum_buffer"])


def test_in_fp32_the_last_bits_of_a_gradient_are_the_last_bits_of_its_direction() -> None:
    gradient = gradients(1, 24, 16)[0]
    nearly = gradient * (1 + 1e-7 * torch.sign(gradients(2, 24, 16)[1]))
    for dtype, within in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        direction = orthogonal(gradient, dtype).float()
        assert float((orthogonal(nearly, dtype).float() - direction).abs().max()) < within
        values = torch.linalg.svdvals(direction)
        assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


def test_a_step_with_a_fault_leaves_all_as_it_is_for_every_parameter() -> None:
    """The same bits as if the step had never been asked for, whatever its gradient was."""
    section = TrainingSection(learning_rate=1e-2, weight_decay=0.1)
    kept = []
    for bad in (None, 1):
        matrix, vector = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4))
        together = Optimizers([build_optimizer([vector], section), Muon([matrix], **OURS)])
        for number, gradient in enumerate(gradients(3, 3, 4)):
            vector.grad = gradient[0].clone()
            if number == bad:
                vector.grad.fill_(torch.inf)
                stepped(together, matrix, torch.full_like(gradient, torch.nan), fault=1.0)
                vector.grad = gradient[0].clone()
            stepped(together, matrix, gradient)
        states = [tensor for parameter in (matrix, vector) for tensor in together.state[parameter].values()]
        kept.append([matrix.detach(), vector.detach(), *states])

    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))


def test_updates_have_the_size_of_adamws() -> None:
    """Which is the learning rate, about a fifth of it each number: one rate is for both."""
    matrix = nn.Parameter(torch.zeros(64, 32))
    muon = Muon([matrix], lr=1e-3, weight_decay=0.0, dtype=torch.float32)

    stepped(muon, matrix, gradients(1, 64, 32)[0])

    assert float(matrix.detach().square().mean().sqrt()) == pytest.approx(0.2e-3, rel=0.25)


BY_TOKEN = ("embed_tokens", "lm_head", "codebook", "markov_w1", "markov_w2", "confidence_head")


@pytest.mark.parametrize("name", method_names())
def test_it_has_the_matrices_inside_a_draft_and_nothing_else(name: str) -> None:
    draft = Case.of(name).draft()
    chosen = hidden_matrices(draft)
    found = {own for own, parameter in draft.named_parameters() if parameter in chosen}
    trained = {own: parameter for own, parameter in draft.named_parameters() if parameter.requires_grad}
    inside = {own for own in trained if not any(part in own for part in BY_TOKEN)}

    assert found == {own for own in inside if trained[own].dim() == 2}
    assert found


def test_both_have_the_rate_of_the_step() -> None:
    matrix, vector = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4))
    together = Optimizers([build_optimizer([vector], TrainingSection()), Muon([matrix], **OURS)])
    for group in together.param_groups:
        group["lr"] = 0.0
    vector.grad = torch.ones(4)

    stepped(together, matrix, gradients(1, 3, 4)[0])

    assert torch.equal(vector, torch.ones(4))
    assert torch.equal(matrix, torch.ones(3, 4))
