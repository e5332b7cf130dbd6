"""A draft survives every format bitwise, and whatever does not fit is named before a server can pass over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from disagg_core.drafts.eagle3.config import Eagle3Config
from disagg_core.drafts.eagle3.model import DecoderLayer, Eagle3Draft
from disagg_core.drafts.eagle3.serving_format import expected_shapes
from disagg_core.drafts.export import VerifierInfo, export_draft, import_draft
from disagg_core.drafts.method import FrozenParts
from disagg_core.errors import BadInput, IncompatibleDraft
from disagg_core.run_spec.document import TargetSection

pytestmark = pytest.mark.unit

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    "vocab_size": 96,
    "draft_vocab_size": 40,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 6]},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "whole vocabulary": {"draft_vocab_size": 96},
    "normed thirds": {"fc_norm": True},
    "another width": {"target_hidden_size": 24, "fc_norm": True},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
}
FORMATS = ["sglang", "hf", "speculators"]


def tensors_of(config: Eagle3Config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in expected_shapes(config).items()
        if name not in ("d2t", "t2d")
    }
    kept = torch.randperm(config.vocab_size, generator=generator)[: config.draft_vocab_size].sort().values
    tensors["d2t"] = kept - torch.arange(config.draft_vocab_size)
    tensors["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, kept, True)
    return tensors


def a_checkpoint(path: Path, **changes: Any) -> tuple[Eagle3Config, dict[str, torch.Tensor]]:
    config = Eagle3Config.from_dict({**BASE, **changes})
    tensors = tensors_of(config)
    path.mkdir(parents=True)
    save_file(tensors, path / "draft.safetensors")
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    return config, tensors


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("format", FORMATS)
def test_exported_and_read_back_is_bitwise_the_bf16_cast(tmp_path: Path, format: Any, variant: str) -> None:
    config, masters = a_checkpoint(tmp_path / "step-3", **VARIANTS[variant])

    export_draft(tmp_path / "step-3", tmp_path / "out", format)
    _, found_config, found = import_draft(tmp_path / "out")

    assert found_config == config
    assert found.keys() == masters.keys()
    for name, master in masters.items():
        cast = master.to(torch.bfloat16).float() if master.is_floating_point() else master
        assert found[name].dtype == cast.dtype
        assert torch.equal(found[name], cast), name


def test_what_sglang_loads(tmp_path: Path) -> None:
    _, masters = a_checkpoint(tmp_path / "step-3")

    report = export_draft(tmp_path / "step-3", tmp_path / "out")

    stored = load_file(tmp_path / "out/model.safetensors")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert stored.keys() == masters.keys()
    assert "embed_tokens.weight" not in stored
    assert all(t.dtype == torch.bfloat16 for name, t in stored.items() if name not in ("d2t", "t2d"))
    assert torch.equal(stored["lm_head.weight"], masters["lm_head.weight"].bfloat16())
    assert (stored["d2t"].dtype, stored["t2d"].dtype) == (torch.int64, torch.bool)
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 6]
    assert config["rope_theta"] == 5e5
    assert config["rope_parameters"]["rope_theta"] == 5e5
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] is False
    assert "norm_output" not in config
    assert (report.dtype, report.tensors) == ("bfloat16", len(masters))
    loaded = LlamaConfig(**config)
    assert (loaded.head_dim, loaded.rope_parameters["rope_theta"]) == (16, 5e5)


def test_others_may_read_an_export_like_any_new_file(tmp_path: Path) -> None:
    a_checkpoint(tmp_path / "step-3")
    (tmp_path / "plain").touch()

    export_draft(tmp_path / "step-3", tmp_path / "out")

    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(("config.json", "model.safetensors"), (tmp_path / "plain").stat().st_mode)


def test_what_vllm_loads(tmp_path: Path) -> None:
    """Names of vLLM's module tree, its count of layers from one, and the sections that it insists on."""
    a_checkpoint(tmp_path / "step-3")
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "target")
    verifier = VerifierInfo.of(TargetSection(model=str(tmp_path / "target")))

    export_draft(tmp_path / "step-3", tmp_path / "out", "speculators", verifier=verifier, draft_tokens=4)

    stored = load_file(tmp_path / "out/model.safetensors")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert not any(name.startswith("midlayer.") for name in stored)
    assert stored["layers.0.self_attn.q_proj.weight"].shape == (64, 64)
    assert config["speculators_model_type"] == "eagle3"
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 7]
    assert config["norm_before_residual"] is False
    assert config["draft_vocab_size"] == 40
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": str(tmp_path / "target"),
        "architectures": ["LlamaForCausalLM"],
    }
    assert config["transformer_layer_config"]["vocab_size"] == 96
    assert "draft_vocab_size" not in config["transformer_layer_config"]


def test_hf_format_is_self_contained_when_the_embedding_is_given(tmp_path: Path) -> None:
    config, _ = a_checkpoint(tmp_path / "step-3")
    embedding, lm_head = torch.randn(2, config.vocab_size, config.target_hidden_size)
    parts = FrozenParts(embedding, lm_head)

    export_draft(tmp_path / "step-3", tmp_path / "out", "hf", parts=parts)

    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["embed_tokens.weight"], embedding.bfloat16())
    assert "embed_tokens.weight" not in import_draft(tmp_path / "out").state
    with pytest.raises(IncompatibleDraft, match=r"embed_tokens\.weight: expected shape \[96, 32\], found \[90, 32\]"):
        export_draft(tmp_path / "step-3", tmp_path / "other", "hf", parts=FrozenParts(embedding[:90], lm_head))
    assert not (tmp_path / "other").exists()


def test_options_that_a_format_has_no_room_for_are_refused(tmp_path: Path) -> None:
    config, _ = a_checkpoint(tmp_path / "step-3")
    parts = FrozenParts(*torch.randn(2, config.vocab_size, config.target_hidden_size))

    with pytest.raises(BadInput, match="in hf format only, found sglang"):
        export_draft(tmp_path / "step-3", tmp_path / "out", "sglang", parts=parts)
    with pytest.raises(BadInput, match="in speculators format only, found hf"):
        export_draft(tmp_path / "step-3", tmp_path / "out", "hf", verifier=VerifierInfo("target"))
    with pytest.raises(BadInput, match="expected one of sglang, hf, speculators for EAGLE-3, found 'gguf'"):
        export_draft(tmp_path / "step-3", tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_masters_can_be_exported_in_full_precision(tmp_path: Path) -> None:
    _, masters = a_checkpoint(tmp_path / "step-3")

    export_draft(tmp_path / "step-3", tmp_path / "out", dtype="float32")

    assert all(torch.equal(t, masters[name]) for name, t in import_draft(tmp_path / "out").state.items())


FAULTS: dict[str, tuple[Any, list[str]]] = {
    "unknown": (lambda t: t.update({"midlayer.extra.weight": torch.ones(2)}), ["unknown tensor midlayer.extra.weight"]),
    "missing": (lambda t: t.pop("midlayer.mlp.up_proj.weight"), ["missing tensor midlayer.mlp.up_proj.weight"]),
    "misshapen": (
        lambda t: t.update({"fc.weight": torch.ones(32, 64)}),
        ["fc.weight: expected shape [32, 96], found [32, 64]"],
    ),
    "ill-typed": (lambda t: t.update({"d2t": t["d2t"].int()}), ["d2t: expected torch.int64, found torch.int32"]),
    "not finite": (lambda t: t["norm.weight"].fill_(float("nan")), ["norm.weight: has values that are not finite"]),
    "renamed": (
        lambda t: t.update({"mid.hidden_norm.weight": t.pop("midlayer.hidden_norm.weight")}),
        ["unknown tensor mid.hidden_norm.weight", "missing tensor midlayer.hidden_norm.weight"],
    ),
    "contradicting maps": (lambda t: t["d2t"].add_(1), ["d2t: does not name the target ids that t2d keeps"]),
    "short map": (lambda t: t["t2d"].zero_(), ["t2d: expected 40 target ids (the length of d2t), found 0"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_written(tmp_path: Path, fault: str) -> None:
    _, tensors = a_checkpoint(tmp_path / "step-3")
    damage, words = FAULTS[fault]
    damage(tensors)
    save_file(tensors, tmp_path / "step-3/draft.safetensors")

    with pytest.raises(IncompatibleDraft) as caught:
        export_draft(tmp_path / "step-3", tmp_path / "out")

    assert all(word in str(caught.value) for word in words)
    assert not (tmp_path / "out").exists()


def test_a_weight_too_large_for_the_dtype_is_named(tmp_path: Path) -> None:
    _, tensors = a_checkpoint(tmp_path / "step-3")
    tensors["lm_head.weight"][0, 0] = 1e6
    save_file(tensors, tmp_path / "step-3/draft.safetensors")

    with pytest.raises(IncompatibleDraft, match=r"as float16.*lm_head\.weight: has values that are not finite"):
        export_draft(tmp_path / "step-3", tmp_path / "out", dtype="float16")


def test_a_failed_export_leaves_the_earlier_one_alone_and_other_files_always(tmp_path: Path) -> None:
    _, tensors = a_checkpoint(tmp_path / "step-3")
    export_draft(tmp_path / "step-3", tmp_path / "out")
    (tmp_path / "out/README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    del tensors["fc.weight"]
    save_file(tensors, tmp_path / "step-3/draft.safetensors")

    with pytest.raises(IncompatibleDraft, match=r"fc\.weight"):
        export_draft(tmp_path / "step-3", tmp_path / "out")

    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_an_earlier_export_is_replaced(tmp_path: Path) -> None:
    a_checkpoint(tmp_path / "step-3")
    config, _ = a_checkpoint(tmp_path / "step-6", draft_vocab_size=48)
    export_draft(tmp_path / "step-3", tmp_path / "out", "speculators")

    export_draft(tmp_path / "step-6", tmp_path / "out")

    assert import_draft(tmp_path / "out").config == config


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_another_model_is_not_overwritten(tmp_path: Path) -> None:
    """A target's folder, one that cannot be read, a sharded draft, and a run's checkpoint."""
    a_checkpoint(tmp_path / "step-3")
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "target")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{")
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded/model.safetensors.index.json").write_text('{"weight_map": {}}')
    a_checkpoint(tmp_path / "step-6")

    for place, file in {
        "target": "config.json",
        "broken": "config.json",
        "sharded": "model.safetensors.index.json",
        "step-6": "draft.safetensors",
    }.items():
        before = contents(tmp_path / place)
        with pytest.raises(BadInput, match=f"{place}: .*found {file} of another model or a checkpoint") as caught:
            export_draft(tmp_path / "step-3", tmp_path / place)
        assert "export to another directory" in str(caught.value)
        assert contents(tmp_path / place) == before


def test_a_published_speculators_draft_comes_in(tmp_path: Path) -> None:
    """As the library writes it: defaults left out of the layer's config, the target's tensors beside the draft's."""
    config, masters = a_checkpoint(tmp_path / "step-3", max_position_embeddings=2048)
    export_draft(tmp_path / "step-3", tmp_path / "out", "speculators")
    document = json.loads((tmp_path / "out/config.json").read_text())
    layer = document["transformer_layer_config"]
    defaults = LlamaConfig().to_dict()
    short = {field: value for field, value in layer.items() if value != defaults.get(field, "none")}
    document["transformer_layer_config"] = {**short, "model_type": "llama"}
    assert "max_position_embeddings" not in short
    (tmp_path / "out/config.json").write_text(json.dumps(document))
    tensors = load_file(tmp_path / "out/model.safetensors")
    save_file(
        {**tensors, "verifier_norm.weight": torch.ones(32), "embed_tokens.weight": torch.ones(96, 32)},
        tmp_path / "out/model.safetensors",
    )

    _, found_config, found = import_draft(tmp_path / "out")

    assert found_config.model_dump(exclude={"initializer_range"}) == config.model_dump(exclude={"initializer_range"})
    assert found.keys() == masters.keys()


def test_a_missing_t2d_follows_from_d2t(tmp_path: Path) -> None:
    _, tensors = a_checkpoint(tmp_path / "step-3")
    expected = tensors.pop("t2d")
    save_file(tensors, tmp_path / "step-3/draft.safetensors")

    assert torch.equal(import_draft(tmp_path / "step-3").state["t2d"], expected)


@pytest.mark.parametrize(
    ("format", "change", "words"),
    [
        ("sglang", {"norm_output": True}, "norm_output"),
        ("sglang", {"num_hidden_layers": 2}, "num_hidden_layers"),
        ("sglang", {"model_type": "qwen2"}, "model_type: expected llama, found qwen2"),
        ("sglang", {"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
        ("sglang", {"eagle_config": {"norm_before_fc": True}}, "norm_before_fc"),
        ("speculators", {"norm_before_residual": None}, "norm_before_residual: true or false"),
        ("speculators", {"speculators_model_type": "medusa"}, r"expected .* \(EAGLE-3.*found .*'medusa'"),
        ("sglang", {"architectures": ["Qwen3ForCausalLM"]}, r"expected .* \(EAGLE-3.*found .*Qwen3ForCausalLM"),
    ],
)
def test_a_draft_that_computes_something_else_is_refused(
    tmp_path: Path, format: Any, change: dict[str, Any], words: str
) -> None:
    a_checkpoint(tmp_path / "step-3")
    export_draft(tmp_path / "step-3", tmp_path / "out", format)
    document = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps({**document, **change}))

    with pytest.raises(IncompatibleDraft, match=words) as caught:
        import_draft(tmp_path / "out")

    assert str(tmp_path / "out") in str(caught.value)


def test_a_published_draft_in_a_pickled_file_is_read_without_running_it(tmp_path: Path) -> None:
    _, tensors = a_checkpoint(tmp_path / "published")
    (tmp_path / "published/draft.safetensors").unlink()
    torch.save(tensors, tmp_path / "published/pytorch_model.bin")

    state = import_draft(tmp_path / "published").state

    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "published/pytorch_model.bin")
    with pytest.raises(IncompatibleDraft, match=r"pytorch_model\.bin: cannot be read as tensors alone"):
        import_draft(tmp_path / "published")


def test_a_draft_without_an_lm_head_takes_the_targets_rows_for_its_tokens(tmp_path: Path) -> None:
    _, tensors = a_checkpoint(tmp_path / "published")
    del tensors["lm_head.weight"], tensors["t2d"]
    save_file(tensors, tmp_path / "published/draft.safetensors")
    parts = FrozenParts(*torch.randn(2, 96, 32))

    method, config, state = import_draft(tmp_path / "published")
    draft = method.model(config)
    draft.load_serving_state_dict(state)
    assert isinstance(draft, Eagle3Draft)
    with pytest.raises(IncompatibleDraft, match=r"no LM head: it shares the target's; call attach\(\) first"):
        draft.require_complete()
    draft.attach(parts)

    assert torch.equal(draft.lm_head.weight, parts.lm_head[state["t2d"].nonzero().flatten()])


def test_a_draft_whose_residual_is_normed_computes_so_and_is_exported_for_vllm_only(tmp_path: Path) -> None:
    a_checkpoint(tmp_path / "step-3", norm_before_residual=True)
    export_draft(tmp_path / "step-3", tmp_path / "out", "speculators", dtype="float32")
    with pytest.raises(IncompatibleDraft, match="expected speculators for a draft with norm_before_residual"):
        export_draft(tmp_path / "step-3", tmp_path / "served", "sglang")

    _, config, _ = import_draft(tmp_path / "out")

    assert isinstance(config, Eagle3Config)
    layer, plain = DecoderLayer(config), DecoderLayer(config.model_copy(update={"norm_before_residual": False}))
    plain.load_state_dict(layer.state_dict())
    state, attended = torch.randn(3, 32), torch.randn(3, config.num_attention_heads * config.head_dim)
    normed = layer.hidden_norm(state)
    torch.testing.assert_close(layer.finish(state, normed, attended), plain.finish(normed, normed, attended))


def test_a_published_draft_that_calls_itself_a_llama_is_told_by_its_draft_vocabulary(tmp_path: Path) -> None:
    config, _ = a_checkpoint(tmp_path / "step-3")
    document = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "step-3/config.json").write_text(json.dumps(document))

    assert import_draft(tmp_path / "step-3").method.name == "eagle3"

    del document["draft_vocab_size"]
    (tmp_path / "step-3/config.json").write_text(json.dumps(document))
    with pytest.raises(IncompatibleDraft, match="expected the config of a draft"):
        import_draft(tmp_path / "step-3")


def test_no_draft_there(tmp_path: Path) -> None:
    with pytest.raises(IncompatibleDraft, match=r"config\.json, found none"):
        import_draft(tmp_path)
    a_checkpoint(tmp_path / "step-3")
    (tmp_path / "step-3/draft.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(IncompatibleDraft, match="cannot be read as safetensors"):
        import_draft(tmp_path / "step-3")
    (tmp_path / "step-3/draft.safetensors").unlink()
    with pytest.raises(IncompatibleDraft, match=r"or pytorch_model\.bin, found none"):
        import_draft(tmp_path / "step-3")
