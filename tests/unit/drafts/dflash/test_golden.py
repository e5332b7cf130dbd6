"""The golden case: what a public trainer computes, at the tolerances given with it, first fault first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from disagg_core.drafts.dflash import DFlashDraft, DFlashOutput, dflash_loss
from disagg_core.drafts.method import FrozenParts
from tests.unit.drafts.dflash.cases import gradients

pytestmark = pytest.mark.unit

GOLDEN = Path(__file__).parents[3] / "data" / "dflash_small.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    """Config and tensors of each section."""
    with safe_open(GOLDEN, "pt") as file:
        sections: dict[str, Any] = {"config": json.loads(file.metadata()["dflash_small/config"])}
        for name in file.keys():  # noqa: SIM118
            _, section, rest = name.split("/", 2)
            sections.setdefault(section, {})[rest] = file.get_tensor(name)
    return sections


def run(golden: dict[str, Any], **options: Any) -> tuple[DFlashDraft, DFlashOutput]:
    draft = DFlashDraft(golden["config"])
    draft.load_serving_state_dict(golden["draft_weights"])
    draft.attach(FrozenParts(golden["frozen"]["embed_tokens"], golden["frozen"]["lm_head"]))
    inputs: dict[str, Tensor] = golden["inputs"]
    blocks = {name: inputs[name] for name in ("anchors", "block_keep")}
    return draft, dflash_loss(draft, inputs, **blocks, gamma=golden["config"]["gamma"], **options)


def test_states_logits_and_loss_of_every_slot_are_the_golden_ones(golden: dict[str, Any]) -> None:
    expected = golden["outputs"]
    _, output = run(golden, return_logits=True)

    torch.testing.assert_close(output.hidden, expected["hidden"], atol=5e-5, rtol=0)
    torch.testing.assert_close(output.logits, expected["logits"], atol=5e-5, rtol=0)
    assert torch.equal(output.target_ids, expected["target_ids"])
    assert torch.equal(output.weight_mask, expected["weight_mask"])
    torch.testing.assert_close(output.ce, expected["ce"], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.loss_weights, expected["loss_weights"], atol=1e-6, rtol=0)
    torch.testing.assert_close(output.loss, expected["loss"], atol=1e-5, rtol=0)
    assert torch.equal(output.pred_ids, expected["pred_ids"])


def test_counts_and_accept_lengths_are_the_golden_ones(golden: dict[str, Any]) -> None:
    expected = golden["outputs"]
    _, output = run(golden)

    assert output.acc_correct == expected["acc_correct"]
    assert output.acc_total == expected["acc_total"]
    assert output.accuracy == expected["accuracy"]
    assert torch.equal(output.accept_len_per_block, expected["accept_len_per_block"])
    assert output.accept_len == expected["accept_len"]
    torch.testing.assert_close(output.loss_num, expected["loss_num"], atol=5e-5, rtol=0)
    torch.testing.assert_close(output.loss_den, expected["loss_den"], atol=1e-5, rtol=0)


def test_gradients_are_the_golden_ones(golden: dict[str, Any]) -> None:
    draft, output = run(golden)
    found = gradients(draft, output.loss)

    assert found.keys() == golden["grads"].keys()
    for name, reference in golden["grads"].items():
        assert float((found[name] - reference).norm() / reference.norm()) < 1e-4, name


def test_the_window_divides_by_what_it_is_told(golden: dict[str, Any]) -> None:
    """Two batches of one window: numerators add, the divisor is the window's."""
    _, alone = run(golden)
    _, part = run(golden, normaliser=2 * alone.loss_den)

    torch.testing.assert_close(2 * part.loss, alone.loss, atol=1e-6, rtol=0)
