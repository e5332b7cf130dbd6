"""Every architecture that people serve is read, planned, captured, trained for, exported and decoded, or refused.

The quick tier reads and plans all of them and takes a handful through everything; the slow tier takes them all.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from disagg_core.contracts import Capture
from disagg_core.drafts.registry import method_names
from disagg_core.errors import TargetError
from disagg_core.evaluation import generate_all
from disagg_core.target.layers import LayerStates
from disagg_core.target.parts import check_target_parts
from tests.zoo import table
from tests.zoo.architectures import ARCHITECTURES, Architecture
from tests.zoo.tiny import HIDDEN, LAYERS, VOCAB, tiny_config, tiny_model
from tests.zoo.trial import Trial, exported, planned, spec_of

pytestmark = pytest.mark.unit

REFUSED = {"gemma3n": "altup_num_inputs", "deepseek_v4": "hc_mult", "bart": "has an encoder too"}
"""Architectures that cannot be targets, with what the message says."""
HANDFUL = ("gemma2", "qwen3_5_moe", "qwen3_vl")
PROMPTS = [[5, 9, 11, 4, 30, 31, 32, 7, 8, 50, 51, 12], [6, 10, 12, 40, 41, 42, 43, 44]]


def every(*, built: bool) -> list[object]:
    """All architectures of the table; the quick tier has those that are read only, and a handful that are built."""
    chosen = [a for a in ARCHITECTURES if not built or (a.built and not a.unfit)]
    quick = [a for a in chosen if not built or a.model_type in HANDFUL]
    slow = [pytest.mark.slow, pytest.mark.timeout(1200)]  # transformers runs some layers token by token
    return [pytest.param(a, id=a.model_type, marks=[] if a in quick else slow) for a in chosen]


@pytest.mark.parametrize("architecture", every(built=False))
def test_a_target_is_planned_for_from_its_config_alone_or_refused_by_name(
    architecture: Architecture, tmp_path: Path
) -> None:
    config = tiny_config(architecture.model_type, **architecture.changes)
    if architecture.model_type in REFUSED:
        with pytest.raises(TargetError, match=REFUSED[architecture.model_type]):
            planned(config, tmp_path)
        return

    facts = planned(config, tmp_path)[0].target

    assert (facts.hidden_size, facts.vocab_size, facts.num_layers) == (HIDDEN, VOCAB, LAYERS)
    assert facts.eos_token_ids == (2,)
    assert not any(isinstance(value, dict) for value in facts.rope_parameters.values())
    assert facts.head_dim % 2 == 0
    assert facts.intermediate_size >= 16


def test_the_table_in_the_documents_is_what_is_so() -> None:
    assert table.committed() == table.table(), "write it again: python -m tests.zoo.table"


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a.unfit], ids=lambda a: a.model_type)
def test_weights_that_no_draft_can_be_trained_from_are_refused_by_name(
    architecture: Architecture, tmp_path: Path
) -> None:
    tiny_model(tiny_config(architecture.model_type, **architecture.changes)).save_pretrained(tmp_path)

    with pytest.raises(TargetError, match=re.escape(str(architecture.unfit))):
        check_target_parts(spec_of(tmp_path).target)


@pytest.mark.parametrize("architecture", every(built=True))
def test_a_target_is_captured_as_transformers_has_it_and_gets_a_draft_of_every_method(
    architecture: Architecture, tmp_path: Path
) -> None:
    trial = Trial.of(architecture, tmp_path / "target")

    states_are_transformers(trial)
    for method in method_names():
        plan = trial.plan(method)
        draft = trial.trained_draft(plan, trial.captured(plan, PROMPTS))
        again = exported(draft, tmp_path / method)
        for name, tensor in draft.serving_state_dict().items():
            torch.testing.assert_close(again.serving_state_dict()[name], tensor, rtol=0, atol=0)
        again.attach(trial.frozen)
        drafted = generate_all(trial.model, again, PROMPTS, draft_tokens=3, max_new_tokens=6)
        assert [generation.tokens for generation in drafted] == [greedy(trial, ids) for ids in PROMPTS], method


def states_are_transformers(trial: Trial) -> None:
    """Captured states and the logits that follow from them are those of transformers."""
    depth = trial.facts.num_layers
    plan = trial.plan("eagle3")
    ids = torch.tensor(PROMPTS[:1])
    with torch.inference_mode():
        plain = trial.model(input_ids=ids, output_hidden_states=True, use_cache=False)
    sample = trial.captured(plan, PROMPTS[:1])[0].tensors
    every_layer = LayerStates(trial.model, Capture(tuple(range(depth - 1)), last_hidden_state=True))
    with torch.inference_mode():
        every_layer.decoder.module(input_ids=ids, use_cache=False)
    states = [*every_layer.layers, every_layer.last]
    every_layer.close()

    skipped = set(getattr(trial.model.config.get_text_config(), "cross_attention_layers", ()))
    ran = [state for layer, state in enumerate(states) if layer not in skipped]
    for state, expected in zip(ran, plain.hidden_states[1:], strict=True):
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-5)
    chosen = torch.cat([states[layer][0] for layer in plan.capture.layers], dim=-1)
    torch.testing.assert_close(sample["aux_hidden_states"], chosen, rtol=0, atol=1e-5)
    teacher = trial.parts.logits(sample["last_hidden_state"])
    torch.testing.assert_close(teacher.softmax(-1), plain.logits[0].softmax(-1), rtol=0, atol=1e-5)


def greedy(trial: Trial, prompt: list[int], count: int = 6) -> list[int]:
    """The target's own continuation, without any cache."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(trial.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]
