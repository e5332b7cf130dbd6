"""DFlash drafts on disk: what others read, and that it reads back as it was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from disagg_core.drafts.dflash import DFlashDraft
from disagg_core.drafts.dflash.method import METHOD
from disagg_core.drafts.export import VerifierInfo, export_draft, import_draft
from disagg_core.errors import BadInput, IncompatibleDraft
from tests.unit.drafts.dflash.cases import KINDS, SLIDING, WINDOWS_BOTH_WAYS, small_draft, target_parts

pytestmark = pytest.mark.unit


def checkpoint(draft: DFlashDraft, directory: Path) -> Path:
    directory.mkdir()
    save_file(draft.serving_state_dict(), directory / "draft.safetensors")
    (directory / "config.json").write_text(json.dumps(draft.config.to_dict()))
    return directory


def config_of(directory: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return document


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_an_export_reads_back_bitwise(kind: dict[str, Any], tmp_path: Path) -> None:
    draft = small_draft(**kind)
    export_draft(checkpoint(draft, tmp_path / "step"), tmp_path / "out")

    method, config, state = import_draft(tmp_path / "out")

    assert method is METHOD
    assert config == draft.config
    expected = {name: tensor.bfloat16() for name, tensor in draft.serving_state_dict().items()}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name].bfloat16(), expected[name]) for name in expected)


def test_names_and_config_are_those_that_sglang_loads(tmp_path: Path) -> None:
    draft = small_draft(num_hidden_layers=1, layer_types=["full_attention"])
    export_draft(checkpoint(draft, tmp_path / "step"), tmp_path / "out")

    assert {name: list(t.shape) for name, t in load_file(tmp_path / "out/model.safetensors").items()} == {
        "fc.weight": [16, 32],
        "hidden_norm.weight": [16],
        "norm.weight": [16],
        "layers.0.input_layernorm.weight": [16],
        "layers.0.post_attention_layernorm.weight": [16],
        "layers.0.self_attn.q_proj.weight": [24, 16],
        "layers.0.self_attn.k_proj.weight": [12, 16],
        "layers.0.self_attn.v_proj.weight": [12, 16],
        "layers.0.self_attn.o_proj.weight": [16, 24],
        "layers.0.self_attn.q_norm.weight": [6],
        "layers.0.self_attn.k_norm.weight": [6],
        "layers.0.mlp.gate_proj.weight": [24, 16],
        "layers.0.mlp.up_proj.weight": [24, 16],
        "layers.0.mlp.down_proj.weight": [16, 24],
    }
    document = config_of(tmp_path / "out")
    assert document["architectures"] == ["DFlashDraftModel"]
    assert document["model_type"] == "qwen3"
    assert document["block_size"] == 4
    assert document["num_target_layers"] == 6
    assert document["dflash_config"] == {"mask_token_id": 39, "target_layer_ids": [1, 3], "block_size": 4}
    assert document["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert document["dtype"] == "bfloat16"
    assert "is_causal" not in document


def test_windows_are_said_as_engines_read_them() -> None:
    sliding = small_draft(**SLIDING).config.to_dict()
    assert (sliding["use_sliding_window"], sliding["sliding_window"]) == (True, 6)
    assert sliding["layer_types"] == ["sliding_attention", "full_attention"]
    assert "is_causal" not in sliding
    assert small_draft(**WINDOWS_BOTH_WAYS).config.to_dict()["is_causal"] is False


@pytest.mark.parametrize("kind", [{}, SLIDING, WINDOWS_BOTH_WAYS], ids=["full", "sliding", "window both ways"])
def test_the_speculators_format_counts_layers_one_higher_and_holds_the_targets_parts(
    kind: dict[str, Any], tmp_path: Path
) -> None:
    draft, out = small_draft(**kind), tmp_path / "out"
    parts = target_parts(draft.config)
    verifier = VerifierInfo("./target", ("Qwen3ForCausalLM",))
    step = checkpoint(draft, tmp_path / "step")

    export_draft(step, out, "speculators", parts=parts, verifier=verifier, draft_tokens=3)

    document, tensors = config_of(out), load_file(out / "model.safetensors")
    assert document["architectures"] == ["DFlashSpeculator"]
    assert document["speculators_model_type"] == "dflash"
    assert document["aux_hidden_state_layer_ids"] == [2, 4]
    assert (document["block_size"], document["mask_token_id"], document["draft_vocab_size"]) == (4, 39, 40)
    assert document["sliding_window_non_causal"] is (kind != SLIDING)
    assert document["sample_from_anchor"] is False
    proposal = document["speculators_config"]["proposal_methods"][0]
    assert (proposal["proposal_type"], proposal["speculative_tokens"]) == ("greedy", 3)
    assert document["speculators_config"]["verifier"]["architectures"] == ["Qwen3ForCausalLM"]
    assert document["transformer_layer_config"]["hidden_size"] == 16
    assert torch.equal(tensors["embed_tokens.weight"], parts.embedding.bfloat16())
    assert torch.equal(tensors["lm_head.weight"], parts.lm_head.bfloat16())

    _, config, state = import_draft(out)
    assert config.model_dump() == {**draft.config.model_dump(), "num_target_layers": None}
    assert state.keys() == draft.serving_state_dict().keys()


def test_what_the_speculators_format_cannot_say_is_refused(tmp_path: Path) -> None:
    step = checkpoint(small_draft(final_logit_softcapping=3.0, output_multiplier=0.5), tmp_path / "step")
    with pytest.raises(IncompatibleDraft, match="cannot say output_multiplier, final_logit_softcapping"):
        export_draft(step, tmp_path / "out", "speculators")
    with pytest.raises(BadInput, match="target's parts are written in speculators format only"):
        export_draft(step, tmp_path / "out", "sglang", parts=target_parts(small_draft().config))


def test_published_spellings_are_read(tmp_path: Path) -> None:
    """Keys inside dflash_config, rope_theta at the top, a prefix, tensors of the target, a table of angles."""
    draft = small_draft()
    export_draft(checkpoint(draft, tmp_path / "step"), tmp_path / "out", dtype="float32")
    document, tensors = config_of(tmp_path / "out"), load_file(tmp_path / "out/model.safetensors")
    for key in ("block_size", "rope_parameters", "layer_types", "head_dim", "sliding_window", "num_target_layers"):
        del document[key]
    document |= {"rope_theta": 10000.0, "head_dim": 6, "transformers_version": "4.57.0", "auto_map": {"AutoModel": "x"}}
    document["dflash_config"] |= {"num_target_layers": 6, "projector_type": None}
    (tmp_path / "out/config.json").write_text(json.dumps(document))
    renamed = {f"model.{name}": tensor for name, tensor in tensors.items()}
    renamed |= {"model.embed_tokens.weight": torch.zeros(40, 16), "rotary_emb.inv_freq": torch.zeros(3)}
    save_file(renamed, tmp_path / "out/model.safetensors")

    _, config, state = import_draft(tmp_path / "out")

    assert config == draft.config
    assert all(torch.equal(state[name], tensor) for name, tensor in draft.serving_state_dict().items())


def test_tensors_that_do_not_fit_are_all_named(tmp_path: Path) -> None:
    step = checkpoint(small_draft(), tmp_path / "step")
    tensors = load_file(step / "draft.safetensors")
    del tensors["fc.weight"]
    tensors["norm.weight"], tensors["mask_hidden"] = torch.zeros(4), torch.zeros(1)
    tensors["hidden_norm.weight"] = torch.full((16,), float("nan"))
    save_file(tensors, step / "draft.safetensors")
    with pytest.raises(IncompatibleDraft) as caught:
        import_draft(step)
    expected = (
        "unknown tensor mask_hidden",
        "missing tensor fc.weight [16, 32]",
        "norm.weight: expected shape [16]",
        "hidden_norm.weight: has values that are not finite",
        str(step),
    )
    for words in expected:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"draft_vocab_size": 30}, "draft_vocab_size: expected the target's whole vocabulary 40, found 30"),
        ({"sample_from_anchor": True}, "sample_from_anchor"),
        ({"transformer_layer_config": {"model_type": "llama"}}, "expected qwen3, found llama"),
        ({"aux_hidden_state_layer_ids": None}, "no target_layer_ids"),
    ],
)
def test_other_kinds_of_speculators_drafts_are_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_draft(checkpoint(small_draft(), tmp_path / "step"), out, "speculators")
    (out / "config.json").write_text(json.dumps({**config_of(out), **change}))
    with pytest.raises(IncompatibleDraft, match=words):
        import_draft(out)


def test_sglang_is_told_the_slots_of_a_block() -> None:
    assert METHOD.server_flags(15) == "--speculative-algorithm DFLASH --speculative-num-draft-tokens 16"
