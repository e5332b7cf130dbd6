"""What a draft is said to cost before it is made, against what a trained one has."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from disagg_core.drafts.cost import trained_bytes
from disagg_core.run_spec.document import TrainingSection
from disagg_core.training.optimizers import optimizer_for
from disagg_core.training.state import optimizer_tensors
from tests.contract.drafts.kit import VOCAB, Case

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_holds_the_bytes_that_were_foretold(case: Case, optimizer: Literal["adamw", "muon"]) -> None:
    draft = case.draft()
    training = optimizer_for(draft, TrainingSection(optimizer=optimizer), torch.device("cpu"))
    case.loss_of(draft, [case.sample(0), case.sample(1, 25)])
    training.step()

    weights = sum(tensor.nbytes for tensor in draft.serving_state_dict().values())
    state = sum(tensor.nbytes for tensor in optimizer_tensors(draft, training).values() if tensor.ndim)

    foretold = trained_bytes(case.method, case.config, optimizer)
    maps = VOCAB + 8 * case.config.draft_vocab_size
    assert weights - foretold.masters in (0, maps), "a vocabulary map is all that is not trained"
    assert foretold.checkpoint == foretold.masters + state
