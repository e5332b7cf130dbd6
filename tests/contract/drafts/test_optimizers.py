"""Every draft method trains with every optimizer, and goes on from a checkpoint with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from disagg_core.drafts.method import DraftModel
from disagg_core.drafts.tensor_files import CHECKPOINT_WEIGHTS
from disagg_core.training.checkpoint import load_into, save_checkpoint
from disagg_core.training.checkpoint.document import OPTIMIZER_FILE
from disagg_core.training.distributed import Ranks
from disagg_core.training.state import prepared_optimizer_tensors
from disagg_core.training.step import OptimizerStep
from tests.contract.drafts.kit import Case
from tests.integration.training.method_kill_main import content_of
from tests.integration.training.method_rank_main import step_of, window_of

STEPS = 4


def train(case: Case, step: OptimizerStep, numbers: range) -> list[float]:
    losses = []
    for number in numbers:
        batches, counts = window_of(case, [(0, 18), (1, 25)])
        queued = step.run(batches, number, **counts)
        assert queued is not None
        losses.append(queued.result().loss)
    return losses


OPTIMIZERS = [
    pytest.param({"optimizer": "adamw"}, id="adamw"),
    pytest.param({"optimizer": "muon"}, id="muon"),
    pytest.param({"optimizer": "muon", "optimizer_offload": True}, id="muon-offloaded"),
]


@pytest.mark.parametrize("training", OPTIMIZERS)
def test_training_goes_on_from_a_checkpoint_with_the_same_bits(
    case: Case, training: dict[str, Any], tmp_path: Path
) -> None:
    with Ranks.join("cpu") as ranks:
        whole = case.draft()
        step = step_of(case, whole, ranks, **training)
        losses = train(case, step, range(STEPS // 2))
        path = save_checkpoint(tmp_path, content_of(case, whole, step, STEPS // 2), keep=1)
        losses += train(case, step, range(STEPS // 2, STEPS))

        resumed = case.draft()
        step = step_of(case, resumed, ranks, **training)
        restore(path, resumed, step)
        again = train(case, step, range(STEPS // 2, STEPS))

        assert losses[-1] < losses[0]
        assert again == losses[STEPS // 2 :]
        assert_equal(resumed, whole)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_where_the_state_lies_changes_no_bit_and_no_checkpoint(case: Case, optimizer: str, tmp_path: Path) -> None:
    """In host memory up to the checkpoint, and not after it."""
    with Ranks.join("cpu") as ranks:
        plain = case.draft()
        losses = train(case, step_of(case, plain, ranks, optimizer=optimizer), range(STEPS))

        first, second = case.draft(), case.draft()
        step = step_of(case, first, ranks, optimizer=optimizer, optimizer_offload=True)
        found = train(case, step, range(STEPS // 2))
        path = save_checkpoint(tmp_path, content_of(case, first, step, STEPS // 2), keep=1)
        step = step_of(case, second, ranks, optimizer=optimizer)
        restore(path, second, step)
        found += train(case, step, range(STEPS // 2, STEPS))

        assert found == losses
        assert_equal(second, plain)


def restore(path: Path, draft: DraftModel, step: OptimizerStep) -> None:
    load_into(path, CHECKPOINT_WEIGHTS, draft.serving_state_dict(), "weights")
    load_into(path, OPTIMIZER_FILE, prepared_optimizer_tensors(draft, step.optimizer), "optimizer state")


def assert_equal(found: DraftModel, expected: DraftModel) -> None:
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
