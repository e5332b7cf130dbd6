"""How ranks that share a packed row divide its work: evenly, each row once, and each row sees what it would see."""

from __future__ import annotations

import pytest
import torch

from disagg_core.drafts.context import Context
from disagg_core.drafts.eagle3.batch import StepPlan, plan_step, step_mask
from disagg_core.drafts.eagle3.flex import document_mask
from disagg_core.drafts.layout import Layout

pytestmark = pytest.mark.unit

LENGTHS, STEPS = (300, 41, 7, 160), 5


def plan_of(context: Context | None, lengths: tuple[int, ...] = LENGTHS) -> StepPlan:
    layout = Layout.of(lengths, multiple_of=1, packed=True)
    real = torch.arange(layout.width)[None, :] < torch.tensor(lengths)[:, None]
    trained = real & (torch.arange(layout.width) % 11 > 3)
    mask = step_mask(trained, real, "aligned")
    device = torch.device("cpu")
    return plan_step(mask, real, STEPS, device, every_row=False, dense=False, layout=layout, context=context)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_row_is_of_one_rank_and_ranks_have_equally_many(size: int) -> None:
    whole = plan_of(None)
    parts = [plan_of(Context(rank, size, None)) for rank in range(size)]

    assert sorted(row for part in parts for row in part.row_key.tolist()) == whole.row_key.tolist()
    torch.testing.assert_close(torch.stack([part.denominators for part in parts]).sum(0), whole.denominators)
    assert all(part.positions == whole.positions for part in parts)
    rows = [part.rows for part in parts]
    assert max(rows) - min(rows) <= 2
    assert {len(part.key_flat) for part in parts} == {-(-whole.keys // size)}
    most = 2 * (whole.teacher_flat.numel() // size + size + STEPS)
    assert all(part.teacher_flat.numel() <= most for part in parts)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_that_share_one_long_sample_have_equally_many_scores_to_make(size: int) -> None:
    parts = [plan_of(Context(rank, size, None), (2000,)) for rank in range(size)]

    scores = [int((part.row_positions + 1).sum()) for part in parts]
    assert max(scores) < 1.01 * min(scores)


def test_a_kernel_that_makes_a_mask_shows_each_row_the_keys_that_it_saw_alone() -> None:
    whole = plan_of(None)
    expected = dict(zip(whole.row_key.tolist(), seen_by(whole), strict=True))

    for rank in range(2):
        part = plan_of(Context(rank, 2, None))
        for row, seen in zip(part.row_key.tolist(), seen_by(part), strict=True):
            assert torch.equal(seen, expected[row])


def seen_by(plan: StepPlan) -> torch.Tensor:
    """Return which keys each row sees, bool ``[rows, keys]``."""
    pattern = document_mask(plan)
    rows, keys = torch.meshgrid(torch.arange(plan.rows), torch.arange(plan.keys), indexing="ij")
    seen: torch.Tensor = pattern.mask_mod(torch.tensor(0), torch.tensor(0), rows, keys)
    return seen
