"""Embedding, LM head and final norm of a target are found in every Hugging Face layout, and nothing else is read."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.cohere import CohereConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.granite import GraniteConfig
from transformers.models.llama import LlamaConfig

from disagg_core.errors import TargetError
from disagg_core.run_spec.document import TargetSection
from disagg_core.target.logits import check_logits
from disagg_core.target.parts import load_target_parts

pytestmark = pytest.mark.unit

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save(model: PreTrainedModel, path: Path, **kwargs: Any) -> TargetSection:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path, **kwargs)
    return TargetSection(model=str(path))


def last_states(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The last hidden state after the final norm, and the logits."""
    ids = torch.randint(3, 64, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model.eval()(ids, output_hidden_states=True)
    return out.hidden_states[-1], out.logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", [None, "8KB"])
def test_single_file_and_shards_tied_and_untied(tmp_path: Path, tied: bool, shard: str | None) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    target = save(model, tmp_path, **({"max_shard_size": shard} if shard else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() is (shard is not None)

    parts = load_target_parts(target)

    hidden, logits = last_states(model)
    assert parts.tied is tied
    assert torch.equal(parts.embedding, model.get_input_embeddings().weight)
    assert torch.equal(parts.lm_head, model.get_output_embeddings().weight)
    assert (parts.lm_head is parts.embedding) is tied
    torch.testing.assert_close(hidden @ parts.lm_head.T, logits)


@pytest.mark.parametrize(
    "config",
    [GraniteConfig(**SIZES, logits_scaling=8.0), CohereConfig(**SIZES, logit_scale=0.0625)],
    ids=["granite", "cohere"],
)
def test_a_constant_factor_on_the_logits_is_folded_into_the_head(tmp_path: Path, config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)

    parts = load_target_parts(save(model, tmp_path))

    hidden, logits = last_states(model)
    torch.testing.assert_close(hidden @ parts.lm_head.T, logits, rtol=1e-5, atol=1e-5)


def test_the_text_part_of_a_multimodal_wrapper_with_its_norm_convention(tmp_path: Path) -> None:
    torch.manual_seed(0)
    text = {**SIZES, "head_dim": 16, "layer_types": ["full_attention"] * 4}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, tie_word_embeddings=True)
    )
    target = save(model, tmp_path)
    before: list[torch.Tensor] = []
    model.get_decoder().norm.register_forward_pre_hook(lambda _, args: before.append(args[0]))

    parts = load_target_parts(target)

    hidden, logits = last_states(model)
    assert parts.tied
    assert torch.equal(parts.embedding, model.get_input_embeddings().weight)
    assert parts.final_norm is not None
    assert parts.final_norm.unit_offset
    torch.testing.assert_close(parts.final_norm(before[0]), hidden)
    torch.testing.assert_close(hidden @ parts.lm_head.T, logits, rtol=1e-5, atol=1e-5)


def test_other_shards_need_not_exist_and_other_tensors_are_not_read(tmp_path: Path) -> None:
    """A 16 GiB tensor beside the embedding, of holes only: reading it would show in time and memory."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    target = save(model, tmp_path)
    header, start, big = {}, 0, 16 * 2**30
    small = {
        "model.embed_tokens.weight": model.get_input_embeddings().weight,
        "lm_head.weight": model.get_output_embeddings().weight,
        "model.norm.weight": model.model.norm.weight,
    }
    for name, tensor in small.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, start + tensor.nbytes]}
        start += tensor.nbytes
    header["model.layers.0.mlp.up_proj.weight"] = {
        "dtype": "F32",
        "shape": [big // 4],
        "data_offsets": [start, start + big],
    }
    encoded = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in small.values():
            file.write(tensor.detach().numpy().tobytes())
        file.truncate(file.tell() + big)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    parts = load_target_parts(target)

    assert torch.equal(parts.lm_head, small["lm_head.weight"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def test_only_the_shards_that_hold_them_are_opened(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    target = save(model, tmp_path, max_shard_size="8KB")
    weights = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {weights[name] for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")}
    for file in set(weights.values()) - needed:
        (tmp_path / file).unlink()

    assert torch.equal(load_target_parts(target).embedding, model.get_input_embeddings().weight)


def rewrite(path: Path, change: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_look_alikes_elsewhere_in_the_checkpoint_are_passed_over(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    target = save(model, tmp_path)
    decoys = ("talker.model.embed_tokens.weight", "model.layers.4.embed_tokens.weight", "visual.lm_head.weight")
    rewrite(tmp_path, lambda t: t.update({name: torch.zeros(64, 32) for name in decoys}))

    parts = load_target_parts(target)

    assert torch.equal(parts.embedding, model.get_input_embeddings().weight)
    assert torch.equal(parts.lm_head, model.get_output_embeddings().weight)


def test_rows_beyond_the_vocabulary_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    target = save(model, tmp_path)
    wide = torch.cat((model.get_input_embeddings().weight.detach(), torch.ones(8, 32)))
    rewrite(tmp_path, lambda t: t.update({"model.embed_tokens.weight": wide}))

    with caplog.at_level("INFO"):
        parts = load_target_parts(target)

    assert torch.equal(parts.embedding, model.get_input_embeddings().weight)
    assert torch.equal(parts.lm_head, model.get_output_embeddings().weight)
    assert [r.getMessage() for r in caplog.records if "rows" in r.getMessage()] == [
        f"{tmp_path}: model.embed_tokens.weight has 72 rows, of which the first 64 are the vocabulary"
    ]


@pytest.mark.parametrize(
    ("scale", "ending"),
    [
        (torch.tensor(0.5), "_scale"),
        (torch.rand(64, 1) + 0.5, "_scale"),
        (torch.rand(64) + 0.5, "_scale"),
        (torch.rand(1, 1) + 0.5, "_scale_inv"),
        (torch.rand(4, 2) + 0.5, "_scale_inv"),
    ],
    ids=["one", "rows", "flat rows", "one block", "blocks"],
)
def test_an_lm_head_in_fp8_is_dequantised(tmp_path: Path, scale: torch.Tensor, ending: str) -> None:
    target = save(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)), tmp_path)
    small = torch.randn(64, 32).to(torch.float8_e4m3fn)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": small, f"lm_head.weight{ending}": scale}))

    head = load_target_parts(target).lm_head

    if scale.dim() == 2 and scale.shape[1] == 2:
        factors = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)
    else:
        factors = scale.reshape(-1, 1)
    torch.testing.assert_close(head, small.float() * factors)


def test_an_lm_head_in_fp8_without_scales_is_named(tmp_path: Path) -> None:
    target = save(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)), tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": torch.randn(64, 32).to(torch.float8_e4m3fn)}))

    with pytest.raises(TargetError, match=r"scales of lm_head\.weight, which is in fp8"):
        load_target_parts(target)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0),
        GraniteConfig(**SIZES, logits_scaling=8.0),
        CohereConfig(**SIZES, logit_scale=0.0625),
    ],
    ids=["gemma2", "granite", "cohere"],
)
def test_the_teacher_has_the_distribution_of_the_model_itself(tmp_path: Path, config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 40  # so that a bound of 5 is felt

    parts = load_target_parts(save(model, tmp_path))

    hidden, logits = last_states(model)
    torch.testing.assert_close(parts.logits(hidden).softmax(-1), logits.softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("lm_head.weight"), ["LM head", "lm_head.weight", "tie_word_embeddings=False"]),
        (lambda t: t.update({"lm_head.weight": torch.zeros(60, 32)}), ["[64, 32]", "lm_head.weight [60, 32]"]),
        (lambda t: t.update({"lm_head.bias": torch.zeros(64)}), ["bias"]),
        (lambda t: t.update({"lm_head.weight": torch.zeros(64, 32, dtype=torch.int8)}), ["I8", "BF16"]),
        (
            lambda t: (
                t.update({f"{x}.embed_tokens.weight": t["model.embed_tokens.weight"].clone() for x in "ab"})
                or t.pop("model.embed_tokens.weight")
            ),
            ["a.embed_tokens.weight", "b.embed_tokens.weight"],
        ),
    ],
    ids=["missing", "misshapen", "bias", "quantised", "ambiguous"],
)
def test_what_does_not_fit_is_named(tmp_path: Path, change: Any, words: list[str]) -> None:
    target = save(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)), tmp_path)
    rewrite(tmp_path, change)

    with pytest.raises(TargetError) as caught:
        load_target_parts(target)

    assert all(word in str(caught.value) for word in words)


def test_a_pickled_checkpoint_is_refused_with_the_way_out(tmp_path: Path) -> None:
    target = save(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")

    with pytest.raises(TargetError, match="convert the weights to safetensors"):
        load_target_parts(target)


def test_logits_that_the_config_does_not_explain_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(GraniteConfig(**SIZES, logits_scaling=8.0)).eval()
    check_logits(model)
    check_logits(model.bfloat16())

    model.lm_head.register_forward_hook(lambda module, args, logits: logits * 2)

    with pytest.raises(TargetError, match=r"GraniteForCausalLM: .* factor 0\.125 .* found others \(off by 50%\)"):
        check_logits(model)
