"""A target is loaded in one way, whoever asks: placed, frozen, in the dtype asked for, whole or in part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from disagg_core.contracts import Capture
from disagg_core.engines.servers.probe import probe_ids, reference_states
from disagg_core.errors import MissingLibrary, TargetError
from disagg_core.run_spec.document import TargetSection
from disagg_core.target.facts import TargetFacts, read_target_facts
from disagg_core.target.loading import load_target

pytestmark = pytest.mark.unit

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "head_dim": 8,
}


@pytest.fixture(scope="module", params=[LlamaConfig, Qwen3Config], ids=["llama", "qwen3"])
def section(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TargetSection:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("target")
    AutoModelForCausalLM.from_config(request.param(**SIZES)).save_pretrained(path)
    return TargetSection(model=str(path), dtype="bfloat16", device="cpu")


@pytest.fixture
def facts(section: TargetSection) -> TargetFacts:
    return read_target_facts(section)


def test_a_target_is_frozen_and_in_its_own_dtype_or_the_one_asked_for(
    section: TargetSection, facts: TargetFacts
) -> None:
    own, wide = load_target(section, facts), load_target(section, facts, dtype=torch.float32)

    assert {parameter.dtype for parameter in own.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert not own.training
    assert not any(parameter.requires_grad for parameter in own.parameters())


def test_the_first_layers_alone_give_what_they_give_in_the_whole_model(
    section: TargetSection, facts: TargetFacts
) -> None:
    capture = Capture((1, 3), last_hidden_state=False)

    whole = reference_states(section, facts, capture)
    part = reference_states(section, facts, capture, whole=False)

    assert (list(whole.layers), list(part.layers)) == ([1, 3], [1])
    assert torch.equal(whole.layers[1], part.layers[1])
    assert whole.input_ids == part.input_ids == probe_ids(facts)
    assert whole.last is not None, "a whole model is compared to its end, whether samples hold that or not"
    assert part.last is None


def test_weights_that_cannot_be_read_are_named(section: TargetSection, facts: TargetFacts, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"target\.model: cannot load"):
        load_target(section.model_copy(update={"model": str(tmp_path)}), facts)


def test_a_target_that_no_gpu_can_hold_alone_says_what_spreads_it(
    section: TargetSection, facts: TargetFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 1000))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)

    with pytest.raises(MissingLibrary, match="to spread it over 4: pip install accelerate"):
        load_target(section.model_copy(update={"device": "auto"}), facts)
