"""The layers of a loaded target are found in every family, and their outputs are transformers' own hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from disagg_core.contracts import Capture
from disagg_core.errors import TargetError
from disagg_core.target.layers import LayerStates, find_decoder

pytestmark = pytest.mark.unit

WIDTH = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48},
    "qwen3": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "gpt_neox": {"intermediate_size": 48},
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **WIDTH, **FAMILIES[family])
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_transformers_hidden_states(family: str) -> None:
    model = model_of(family)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    states = LayerStates(model, Capture((0, 2), last_hidden_state=True))

    with torch.no_grad():
        plain = model(ids, output_hidden_states=True)

    first, third = states.layers
    assert torch.equal(first, plain.hidden_states[1])
    assert torch.equal(third, plain.hidden_states[3])
    assert states.last is not None
    assert torch.equal(states.last, plain.hidden_states[-1])


def test_nothing_is_left_on_the_model_and_nothing_unwanted_is_kept() -> None:
    model = model_of("llama")
    states = LayerStates(model, Capture((1,), last_hidden_state=False))
    with torch.no_grad():
        states.decoder.module(torch.tensor([[5, 6]]))

    assert states.last is None
    assert len(states.layers) == 1
    states.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_two_readers_of_one_model_do_not_disturb_each_other() -> None:
    model = model_of("llama")
    one, other = (LayerStates(model, Capture((layer,), last_hidden_state=False)) for layer in (0, 2))
    with torch.no_grad():
        plain = model(torch.tensor([[5, 6, 7]]), output_hidden_states=True)

    one.close()

    assert torch.equal(other.layers[0], plain.hidden_states[3])


@pytest.mark.parametrize("layers", [(4,), (0, 7), (-1,)])
def test_a_layer_that_the_model_does_not_have_is_named(layers: tuple[int, ...]) -> None:
    with pytest.raises(TargetError, match=rf"expected layers from 0 to 3 to capture, found \[{layers[-1]}\]"):
        LayerStates(model_of("llama"), Capture(layers, last_hidden_state=False))


def test_a_model_that_is_built_in_another_way_is_refused() -> None:
    model = model_of("llama")
    decoder = find_decoder(model).module
    decoder.blocks, decoder.layers = decoder.layers, torch.nn.ModuleList()

    assert len(find_decoder(model).layers) == 4
    del decoder.norm
    with pytest.raises(TargetError, match="LlamaForCausalLM: expected a decoder with one stack of 4 layers and one"):
        find_decoder(model)
