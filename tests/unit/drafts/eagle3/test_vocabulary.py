"""The passes that a GPU runs fused give the figures and slopes of those that a CPU runs in place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from disagg_core.drafts.eagle3.lm_loss import Slopes
from disagg_core.drafts.eagle3.vocabulary import FusedPasses, InPlacePasses, TeacherSlice, fused_draft, fused_teacher

pytestmark = pytest.mark.unit
STEPS, ROWS, DRAFT, TARGET = 3, 5, 24, 40


def logits_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def a_teacher(draft_ids: Tensor | None) -> TeacherSlice:
    probabilities, full, token = InPlacePasses().of_teacher(logits_of(ROWS, TARGET), draft_ids)
    return TeacherSlice(probabilities, full, token % DRAFT, torch.ones(ROWS, dtype=torch.bool))


def slopes_of(kind: str) -> Slopes:
    by_step = torch.tensor([1.0, 0.8, 0.64], dtype=torch.float64)
    return {
        "entropy": Slopes(by_step, None, None),
        "accepted": Slopes(by_step, -by_step, None),
        "log": Slopes(None, None, -by_step),
    }[kind]


@pytest.mark.parametrize("chosen", [True, False], ids=["some of the tokens", "all tokens"])
def test_the_teacher_is_the_same(chosen: bool) -> None:
    draft_ids = torch.arange(0, TARGET, 2) if chosen else None

    expected = InPlacePasses().of_teacher(logits_of(ROWS, TARGET), draft_ids)
    found = fused_teacher(logits_of(ROWS, TARGET), draft_ids)

    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["entropy", "accepted", "log"])
def test_sums_and_slopes_are_the_same(kind: str) -> None:
    teacher, slopes = a_teacher(torch.arange(DRAFT)), slopes_of(kind)
    weight = (logits_of(STEPS, ROWS, seed=2) > 0).double()
    given = logits_of(STEPS, ROWS, DRAFT, seed=1)

    expected = InPlacePasses().of_draft(given.clone(), teacher, weight, slopes, torch.float64)
    by = (slopes.cross_entropy, slopes.accepted, slopes.log_accepted)
    before = given.clone()
    found = fused_draft(given, teacher.probabilities, teacher.full, teacher.target, weight, by, torch.float64)

    assert torch.equal(given, before)
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_compiled_they_are_the_same_and_without_slopes_nothing_is_written() -> None:
    teacher, weight = a_teacher(torch.arange(DRAFT)), torch.ones(STEPS, ROWS, dtype=torch.float64)
    given = logits_of(STEPS, ROWS, DRAFT, seed=1)

    expected, _ = InPlacePasses().of_draft(given.clone(), teacher, weight, None, torch.float32)
    found, nothing = FusedPasses().of_draft(given.clone(), teacher, weight, None, torch.float32)
    sums, slope = FusedPasses().of_draft(given.clone(), teacher, weight, slopes_of("entropy"), torch.float32)

    assert nothing is None
    assert slope is not None
    assert slope.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(sums, expected)
