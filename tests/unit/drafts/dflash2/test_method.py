"""DFlash2 behind the seam: options, formats, warm start from DFlash, and lossless decoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from disagg_core.contracts import Capture
from disagg_core.drafts.dflash.method import METHOD as DFLASH
from disagg_core.drafts.dflash.model import DFlashDraft
from disagg_core.drafts.dflash2.config import DFlash2Config
from disagg_core.drafts.dflash2.method import METHOD
from disagg_core.drafts.dflash2.model import DFlash2Draft
from disagg_core.drafts.dflash2.options import DFlash2Section
from disagg_core.drafts.dspark.options import DSparkSection
from disagg_core.drafts.export import export_draft, import_draft
from disagg_core.drafts.method import FrozenParts
from disagg_core.drafts.registry import method_of
from disagg_core.drafts.vocab import VocabMap
from disagg_core.drafts.warm_start import read_warm_start
from disagg_core.errors import BadInput, IncompatibleDraft
from disagg_core.evaluation import generate_all
from tests.unit.drafts.dflash.cases import KINDS, VOCAB, WINDOWS_BOTH_WAYS, filled, small_draft, some_facts
from tests.unit.drafts.dflash2.cases import small_config2, small_draft2
from tests.unit.evaluation.models import VOCAB as TARGET_VOCAB
from tests.unit.evaluation.models import greedy, make_target

pytestmark = pytest.mark.unit

PUBLISHED = {
    "architectures": ["DFlash2DraftModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "is_causal": False,
    "dflash_config": {
        "block_size": 4,
        "conv_group_size": 4,
        "conv_kernel_size": 2,
        "final_logit_softcapping": 20.0,
        "mask_token_id": 39,
        "output_multiplier": 0.19611613513818404,
        "selector_rank": 5,
        "selector_top_k": 6,
        "target_layer_ids": [1, 3],
    },
    "head_dim": 6,
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "layer_types": ["sliding_attention", "sliding_attention"],
    "max_position_embeddings": 131072,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_target_layers": 6,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "sliding_window": 2048,
    "tie_word_embeddings": False,
    "use_sliding_window": True,
    "vocab_size": 40,
}
"""How published files are laid out, with the sizes of a small draft."""


def checkpoint(draft: DFlashDraft, directory: Path) -> Path:
    directory.mkdir()
    save_file(draft.serving_state_dict(), directory / "draft.safetensors")
    (directory / "config.json").write_text(json.dumps(draft.config.to_dict()))
    return directory


def test_the_registry_knows_it_and_its_published_defaults() -> None:
    assert method_of("dflash2") is METHOD
    section = DFlash2Section()
    assert (section.conv_kernel_size, section.conv_group_size) == (2, 16)
    assert (section.selector_rank, section.selector_top_k, section.selector.loss_weight) == (256, 16, 1.0)
    config = METHOD.config_for(
        DFlash2Section(mask_token_id=39, selector_rank=5), some_facts(), Capture((1, 9), False), VOCAB
    )
    assert isinstance(config, DFlash2Config)
    assert {mask.window for mask in config.layer_masks} == {2048}
    assert not any(mask.causal for mask in config.layer_masks)
    assert METHOD.parameters(config) == sum(p.numel() for p in METHOD.model(config).parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"conv_group_size": 5}, "conv_group_size 5 does not divide hidden_size 16"),
        ({"selector_top_k": 41}, "selector_top_k 41 is above vocab_size 40"),
        ({"block_size": 40}, "draft.block_size"),
    ],
)
def test_what_cannot_work_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        METHOD.check(DFlash2Section(mask_token_id=39, **options), some_facts(), max_tokens=32, draft_tokens=7)


@pytest.mark.parametrize("kind", [*KINDS.values(), {"is_causal": False}], ids=[*KINDS, "both ways"])
def test_an_export_reads_back_bitwise(kind: dict[str, Any], tmp_path: Path) -> None:
    draft = small_draft2(**kind)
    export_draft(checkpoint(draft, tmp_path / "step"), tmp_path / "out")

    method, config, state = import_draft(tmp_path / "out")

    assert method is METHOD
    assert config == draft.config
    expected = {name: tensor.bfloat16() for name, tensor in draft.serving_state_dict().items()}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name].bfloat16(), expected[name]) for name in expected)


def test_names_and_config_are_those_that_engines_load(tmp_path: Path) -> None:
    draft, plain = small_draft2(**WINDOWS_BOTH_WAYS), small_draft()
    export_draft(checkpoint(draft, tmp_path / "step"), tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    added = {name: list(t.shape) for name, t in tensors.items() if name not in plain.serving_state_dict()}
    convolutions = {
        f"layers.{layer}.{side}_conv.{name}": shape
        for layer in (0, 1)
        for side in ("attention", "mlp")
        for name, shape in {"base_kernel": [2, 2, 16], "kernel_projection.weight": [16, 16]}.items()
    }
    assert added == {
        **convolutions,
        "candidate_selector.predecessor_codebook": [40, 5],
        "candidate_selector.successor_codebook": [40, 5],
        "candidate_selector.hidden_projection.weight": [5, 16],
    }
    document = json.loads((tmp_path / "out/config.json").read_text())
    assert document["architectures"] == ["DFlash2DraftModel"]
    assert document["is_causal"] is False
    assert document["dflash_config"] == {
        "mask_token_id": 39,
        "target_layer_ids": [1, 3],
        "block_size": 4,
        "conv_kernel_size": 2,
        "conv_group_size": 4,
        "selector_rank": 5,
        "selector_top_k": 6,
    }


@pytest.mark.parametrize("name", ["DFlash2DraftModel", "DFlashDraftModel"])
def test_a_published_config_is_read_whatever_its_architecture_is_called(name: str) -> None:
    document = {**PUBLISHED, "architectures": [name]}
    assert METHOD.recognises(document)
    assert not DFLASH.recognises(document)
    state = small_draft2().serving_state_dict()
    config, tensors = METHOD.read(document, {f"model.{key}": tensor for key, tensor in state.items()}, "here")
    assert isinstance(config, DFlash2Config)
    assert (config.output_multiplier, config.final_logit_softcapping) == (0.19611613513818404, 20.0)
    assert tensors.keys() == state.keys()


def test_the_speculators_format_reads_back(tmp_path: Path) -> None:
    draft = small_draft2(**WINDOWS_BOTH_WAYS)
    export_draft(checkpoint(draft, tmp_path / "step"), tmp_path / "out", "speculators", dtype="float32")
    document = json.loads((tmp_path / "out/config.json").read_text())
    assert document["speculators_model_type"] == "dflash2"
    assert (document["selector_top_k"], document["conv_group_size"]) == (6, 4)
    assert document["sliding_window_non_causal"] is True

    method, config, state = import_draft(tmp_path / "out")

    assert method is METHOD
    assert config.model_dump() == {**draft.config.model_dump(), "num_target_layers": None}
    assert all(torch.equal(state[name], tensor) for name, tensor in draft.serving_state_dict().items())


def test_a_dflash_draft_goes_on_as_the_dflash2_draft_that_it_is(tmp_path: Path) -> None:
    """Its export, read by DFlash2 and continued: the same tensors, and parts that do nothing yet."""
    changes = {"hidden_size": 32, "vocab_size": 64, "mask_token_id": 63}
    plain = small_draft(**changes)
    export_draft(checkpoint(plain, tmp_path / "step"), tmp_path / "out", dtype="float32")
    facts, capture = some_facts(num_layers=6, hidden_size=32, vocab_size=64), Capture((1, 3), False)

    section = DFlash2Section(init_from=str(tmp_path / "out"))
    method, config, state = read_warm_start(tmp_path / "out", section, facts, capture)
    draft = method.continued(config, state, facts, capture, VocabMap.identity(64))

    assert isinstance(draft, DFlash2Draft)
    found = draft.serving_state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.serving_state_dict().items())
    assert draft.config.layer_masks == plain.config.layer_masks
    assert draft.config.selector_rank == 256
    with pytest.raises(IncompatibleDraft, match="captured layers"):
        read_warm_start(tmp_path / "out", section, facts, Capture((0, 3), False))
    with pytest.raises(IncompatibleDraft, match=r"expected a draft of method dspark, found dflash"):
        read_warm_start(tmp_path / "out", DSparkSection(init_from=section.init_from), facts, capture)


def test_a_dflash2_draft_keeps_its_own_convolutions_and_selector() -> None:
    draft = small_draft2()
    state = draft.serving_state_dict()
    ranks = (draft.config.selector_rank, draft.config.selector_rank + 1)
    same, other = (DFlash2Section(init_from="./draft", selector_rank=rank) for rank in ranks)

    assert METHOD.adopted(same, draft.config, state)[0] is draft.config
    with pytest.raises(IncompatibleDraft, match="its own selector_rank; leave them out"):
        METHOD.adopted(other, draft.config, state)


def draft_for(target: LlamaForCausalLM, **changes: Any) -> DFlash2Draft:
    sizes = {"hidden_size": 32, "vocab_size": TARGET_VOCAB, "mask_token_id": TARGET_VOCAB - 1}
    layers = {"target_layer_ids": [0, 2], "num_target_layers": 4, "block_size": 6}
    draft = filled(DFlash2Draft(small_config2(**{**sizes, **layers, **changes})))
    draft.attach(FrozenParts(target.get_input_embeddings().weight, target.lm_head.weight))
    return draft.eval()


@pytest.mark.parametrize("draft_tokens", [2, 5])
def test_the_output_is_the_targets_own(draft_tokens: int) -> None:
    target = make_target()
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, TARGET_VOCAB - 1, (n,), generator=generator).tolist() for n in (1, 17, 9, 30)]
    expected = [greedy(target, prompt, 20) for prompt in prompts]
    draft = draft_for(target, **WINDOWS_BOTH_WAYS | {"sliding_window": 7})

    generations = generate_all(target, draft, prompts, draft_tokens=draft_tokens, max_new_tokens=20)

    assert [generation.tokens for generation in generations] == expected


def test_sampled_tokens_follow_the_target() -> None:
    """The second token at temperature 1, drawn over the candidates or again, has the target's distribution."""
    target, prompt, count = make_target(), [3, 1, 4, 1, 5], 400
    counts = torch.zeros(TARGET_VOCAB)
    generations = generate_all(
        target,
        draft_for(target, selector_top_k=3),
        [prompt] * count,
        draft_tokens=3,
        max_new_tokens=2,
        temperature=1.0,
        generator=torch.Generator().manual_seed(2),
        batch_size=count,
    )
    for generation in generations:
        counts[generation.tokens[1]] += 1
    with torch.inference_mode():
        first = torch.softmax(target(input_ids=torch.tensor([prompt])).logits[0, -1], -1)
        ids = torch.tensor([[*prompt, token] for token in range(TARGET_VOCAB)])
        second = torch.softmax(target(input_ids=ids).logits[:, -1], -1)
    assert float((counts / count - first @ second).abs().sum() / 2) < 0.2
