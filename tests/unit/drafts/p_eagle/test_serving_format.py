"""A draft survives its file bitwise, other makers' files are read, and whatever does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from disagg_core.drafts.export import VerifierInfo, export_draft, import_draft
from disagg_core.drafts.method import ExportRequest
from disagg_core.drafts.p_eagle.model import PEagleDraft
from disagg_core.drafts.p_eagle.serving_format import expected_shapes, read, written
from disagg_core.errors import IncompatibleDraft
from tests.unit.drafts.p_eagle.cases import small_config, small_draft

pytestmark = pytest.mark.unit


def checkpoint(path: Path, draft: PEagleDraft) -> Path:
    path.mkdir()
    save_file({name: tensor.detach().contiguous() for name, tensor in draft.serving_state_dict().items()},
              path / "draft.safetensors")  # fmt: skip
    (path / "config.json").write_text(json.dumps(draft.config.to_dict()))
    return path


def exported(draft: PEagleDraft, **changes: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    request = ExportRequest(**({"format": "speculators", "dtype": "float32", "draft_tokens": 4} | changes))
    document, tensors = written(draft.config, dict(draft.serving_state_dict()), request)
    return json.loads(json.dumps(document)), tensors


@pytest.mark.parametrize("window", [None, 12])
def test_an_export_reads_back_bitwise_in_bf16(tmp_path: Path, window: int | None) -> None:
    draft = small_draft(sliding_window=window, layer_types=["sliding_attention"] * 3 if window else None)
    verifier = VerifierInfo("org/target", ("LlamaForCausalLM",))

    export_draft(checkpoint(tmp_path / "run", draft), tmp_path / "out", verifier=verifier, draft_tokens=4)

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected_shapes(draft.config)
    for name, tensor in draft.serving_state_dict().items():
        wanted = tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        assert torch.equal(tensors[name], wanted), name
    method, config, state = import_draft(tmp_path / "out")
    assert method.name == "p_eagle"
    assert config == draft.config
    assert set(state) == set(tensors)


def test_the_config_says_what_vllm_asks_for() -> None:
    document, _ = exported(small_draft(), verifier_name="org/target", verifier_architectures=("LlamaForCausalLM",))

    assert document["speculators_model_type"] == "peagle"
    assert document["mask_token_id"] == 39
    assert document["norm_before_residual"] is False
    assert document["eagle_aux_hidden_state_layer_ids"] == [1, 3, 5]
    assert document["transformer_layer_config"]["num_hidden_layers"] == 3
    assert document["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert document["speculators_config"]["verifier"]["name_or_path"] == "org/target"


def test_a_whole_vocabulary_is_written_without_maps_and_gets_them_back() -> None:
    draft = small_draft(draft_vocab_size=40)
    document, tensors = exported(draft)

    assert not {"d2t", "t2d"} & set(tensors)
    _, state = read(document, tensors, "export")
    assert bool(state["t2d"].all())
    assert not state["d2t"].any()


def test_depths_of_another_maker_s_file_are_the_tokens_it_proposes() -> None:
    document, tensors = exported(small_draft())
    del document["para_depths"]

    config, _ = read(document, tensors, "export")

    assert config.depths == 4


def test_a_plain_config_is_read_too() -> None:
    plain = {
        "architectures": ["PEagleDraftModel"],
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 40,
        "mask_token_id": 39,
        "rope_theta": 1e6,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 5]},
    }
    draft = PEagleDraft(plain)
    assert draft.config.layers == (1, 3, 5)
    assert draft.config.rope_parameters["rope_theta"] == 1e6

    config, _ = read(plain, dict(draft.serving_state_dict()), "plain")
    assert config == draft.config


def test_a_draft_whose_residual_is_normed_computes_so_and_says_so() -> None:
    """It computes what a draft with the state as its residual does where the norm changes nothing, and only there."""
    normed, plain = small_draft(norm_before_residual=True), small_draft()
    document, tensors = exported(normed)
    assert document["norm_before_residual"] is True
    assert "norm_before_residual" not in document["transformer_layer_config"]
    config, _ = read(document, tensors, "export")
    assert config == normed.config

    embedded, state = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(3))
    state = state * torch.rsqrt(state.pow(2).mean(-1, keepdim=True))
    first = normed.layers[0].hidden_norm.weight
    ones = torch.ones_like(first)
    angles = normed.rotary(torch.arange(5), 5, torch.float32)

    def attend(index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.repeat_interleave(2, dim=-2)

    def output(draft: PEagleDraft, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            draft.layers[0].hidden_norm.weight.copy_(weight)
            return draft.backbone(embedded, state, angles, attend)

    assert not torch.allclose(output(normed, 2 * ones), output(plain, 2 * ones), atol=1e-2)
    torch.testing.assert_close(output(normed, ones), output(plain, ones), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm_before_residual": None}, "norm_before_residual: expected False, found None"),
        ({"norm_before_fc": True}, "norm_before_fc: expected False, found True"),
        ({"target_hidden_size": 32}, "target_hidden_size: expected the draft's 16, found 32"),
        ({"mask_token_id": 40}, "mask_token_id: expected an id below 40, found 40"),
        ({"mask_token_id": None}, "mask_token_id"),
    ],
)
def test_a_draft_of_another_kind_is_refused(changes: dict[str, Any], named: str) -> None:
    document, tensors = exported(small_draft())
    with pytest.raises(IncompatibleDraft, match=f"export: .*{named}"):
        read(document | changes, tensors, "export")


def test_layers_of_another_kind_are_refused() -> None:
    for changes, named in (
        ({"model_type": "qwen3"}, "model_type: expected 'llama', found 'qwen3'"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types: expected one kind"),
    ):
        document, tensors = exported(small_draft())
        document["transformer_layer_config"] |= changes
        with pytest.raises(IncompatibleDraft, match=named):
            read(document, tensors, "export")


def test_every_tensor_that_does_not_fit_is_named() -> None:
    document, tensors = exported(small_draft())
    tensors["layers.1.self_attn.q_proj.weight"] = torch.zeros(24, 32)
    tensors["mask_hidden"] = torch.full((1, 1, 48), float("nan"))
    tensors["layers.3.input_layernorm.weight"] = torch.zeros(16)
    del tensors["embed_tokens.weight"]

    with pytest.raises(IncompatibleDraft) as raised:
        read(document, tensors, "export")

    for named in (
        r"unknown tensor layers.3.input_layernorm.weight [16]",
        r"missing tensor embed_tokens.weight [40, 16]",
        r"layers.1.self_attn.q_proj.weight: expected shape [24, 16], found [24, 32]",
        r"mask_hidden: has values that are not finite",
    ):
        assert named in str(raised.value)


def test_an_export_that_proposes_more_than_was_trained_or_hides_its_layers_is_refused() -> None:
    with pytest.raises(IncompatibleDraft, match="draft_tokens: expected at most 5"):
        exported(small_draft(), draft_tokens=6)
    with pytest.raises(IncompatibleDraft, match="which layers"):
        exported(small_draft(aux_layer_ids=None))


def test_sizes_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(IncompatibleDraft, match="num_attention_heads 4 is no multiple of num_key_value_heads 3"):
        small_config(num_key_value_heads=3)
    with pytest.raises(IncompatibleDraft, match="draft_vocab_size 41 is above vocab_size 40"):
        small_config(draft_vocab_size=41)
