"""The golden case: what the field's trainers compute, at the tolerances given with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from disagg_core.drafts.eagle3 import Eagle3Draft, TttOutput, training_time_test
from tests.unit.drafts.eagle3.cases import gradients

pytestmark = pytest.mark.unit
Golden = tuple[dict[str, object], dict[str, Tensor]]


def run(golden: Golden, **options: object) -> tuple[Eagle3Draft, TttOutput]:
    config, tensors = golden
    draft = Eagle3Draft(config)
    draft.load_state_dict({n.split("/")[1]: t for n, t in tensors.items() if n.startswith("draft_weights/")})
    names = ("input_ids", "attention_mask", "loss_mask", "aux_hidden_states")
    batch = {name: tensors[f"inputs/{name}"] for name in names}
    output = training_time_test(
        draft,
        {**batch, "last_hidden_state": tensors["inputs/target_last_hidden"]},
        lm_head=tensors["inputs/target_lm_head"],
        ttt_length=3,
        mask_mode="compat",
        normalisation="compat",
        loss="soft_cross_entropy",
        **options,
    )
    return draft, output


@pytest.mark.parametrize("options", [{}, {"return_logits": True}, {"activation_checkpointing": True}])
def test_losses_counts_and_gradients_are_the_golden_ones(golden: Golden, options: dict[str, object]) -> None:
    expected = golden[1]
    draft, output = run(golden, **options)

    torch.testing.assert_close(output.total, expected["outputs/loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.step_losses, expected["outputs/plosses"], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.acceptance_rates, expected["outputs/acceptance_rates"], atol=1e-5, rtol=0)
    assert torch.equal(output.correct, expected["outputs/acc_corrects"])
    assert torch.equal(output.denominators, expected["outputs/acc_denoms"])
    found = gradients(draft, output.total)
    assert "embed_tokens.weight" in found
    for name, gradient in found.items():
        reference = expected[f"grads/{name}"]
        assert float((gradient - reference).norm() / reference.norm()) < 1e-4, name


def test_logits_and_states_of_every_row_are_the_golden_ones(golden: Golden) -> None:
    _, output = run(golden, return_logits=True)
    assert output.logits is not None
    assert output.states is not None
    torch.testing.assert_close(output.logits, golden[1]["outputs/step_logits"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(output.states, golden[1]["outputs/step_hidden_prenorm"], atol=2e-5, rtol=1e-4)


def test_the_flash_kernel_path_gives_the_same_where_rows_are_live(golden: Golden) -> None:
    _, output = run(golden, attention="flash", return_logits=True)
    assert output.logits is not None
    real = golden[1]["inputs/attention_mask"].bool().expand(3, -1, -1)
    torch.testing.assert_close(output.logits[real], golden[1]["outputs/step_logits"][real], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(output.total, golden[1]["outputs/loss"], atol=1e-5, rtol=0)
