"""What is read of a target's config: sizes by rule, every id that ends a text, a version that tells revisions apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.models.gemma3 import Gemma3Config, Gemma3TextConfig
from transformers.models.gemma4 import Gemma4TextConfig
from transformers.models.llama import LlamaConfig
from transformers.models.qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5_moe import Qwen3_5MoeTextConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig

from disagg_core.drafts.eagle3.config import Eagle3Config
from disagg_core.drafts.eagle3.options import Eagle3Section
from disagg_core.errors import TargetError
from disagg_core.run_spec.document import TargetSection
from disagg_core.target.facts import TargetFacts, read_target_facts, target_version
from disagg_core.target.weights import weight_bytes

pytestmark = pytest.mark.unit


def test_two_commits_of_a_hub_model_are_two_versions() -> None:
    target = TargetSection(model="org/model")
    versions = {target_version(target, {"hidden_size": 8}, commit=commit) for commit in (None, "a" * 40, "b" * 40)}
    assert len(versions) == 3


def test_a_branch_and_the_commit_it_stands_for_are_one_version() -> None:
    pinned = TargetSection(model="org/model", revision="a" * 40)
    branch = TargetSection(model="org/model", revision="main")
    commit = "a" * 40
    assert target_version(pinned, {}, commit=commit) == target_version(branch, {}, commit=commit)


SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 64}


def facts_of(config: PreTrainedConfig, directory: Path) -> TargetFacts:
    config.save_pretrained(directory)
    return read_target_facts(TargetSection(model=str(directory)))


def test_a_text_ends_with_the_ids_of_the_config_and_of_the_generation_config(tmp_path: Path) -> None:
    GenerationConfig(eos_token_id=[2, 7]).save_pretrained(tmp_path)

    facts = facts_of(LlamaConfig(**SIZES, eos_token_id=2), tmp_path)

    assert facts.eos_token_ids == (2, 7)
    (tmp_path / "generation_config.json").unlink()
    assert facts_of(LlamaConfig(**SIZES, eos_token_id=2), tmp_path).version != facts.version


def test_a_wrapper_ends_texts_as_its_text_part_does(tmp_path: Path) -> None:
    config = Gemma3Config(text_config={**SIZES, "intermediate_size": 48, "head_dim": 8, "eos_token_id": [5, 6]})

    facts = facts_of(config, tmp_path)

    assert {5, 6} <= set(facts.eos_token_ids)
    assert (facts.hidden_size, facts.model_type) == (32, "gemma3_text")


def test_a_draft_is_served_with_the_embedding_of_gemma_4_times_its_width(tmp_path: Path) -> None:
    """SGLang gives a draft of blocks the target's embedding module: Gemma 4's scales, Gemma 3 has no such drafts."""
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 48, "head_dim": 16}

    assert facts_of(Gemma4TextConfig(**sizes), tmp_path / "4").embedding_scale == 8.0
    assert facts_of(Gemma3TextConfig(**sizes), tmp_path / "3").embedding_scale == 1.0


def test_of_kinds_of_layers_with_unlike_rotation_it_is_full_attentions(tmp_path: Path) -> None:
    config = Gemma3TextConfig(**SIZES, intermediate_size=48, head_dim=8)

    facts = facts_of(config, tmp_path)
    draft = Eagle3Config.for_target(facts, Eagle3Section()).to_dict()

    assert facts.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert (draft["rope_theta"], draft["rope_scaling"]) == (1e6, None)
    assert draft["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}


@pytest.mark.parametrize(("own", "theta"), [(None, 1e7), (5e5, 5e5)])
def test_a_target_that_rotates_a_part_of_a_head_gets_a_draft_that_rotates_it_whole(
    tmp_path: Path, own: float | None, theta: float
) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    facts = facts_of(Qwen3_5TextConfig(**SIZES, head_dim=16, rope_parameters=rope), tmp_path)

    draft = Eagle3Config.for_target(facts, Eagle3Section(rope_theta=own)).to_dict()

    assert facts.rope_parameters["partial_rotary_factor"] == 0.25
    assert draft["rope_parameters"] == {"rope_type": "default", "rope_theta": theta}
    assert "partial_rotary_factor" not in draft


def test_a_target_of_experts_only_gets_a_draft_of_four_times_the_hidden_size_or_as_asked(tmp_path: Path) -> None:
    config = Qwen3_5MoeTextConfig(
        **SIZES, head_dim=8, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4
    )
    facts = facts_of(config, tmp_path)

    assert Eagle3Config.for_target(facts, Eagle3Section()).intermediate_size == 128
    assert Eagle3Config.for_target(facts, Eagle3Section(intermediate_size=96)).intermediate_size == 96


def test_a_size_that_cannot_be_found_is_named(tmp_path: Path) -> None:
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    document = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(document | {"vocab_size": 0}))

    with pytest.raises(TargetError, match="expected vocab_size in the config of llama, found none"):
        read_target_facts(TargetSection(model=str(tmp_path)))


def test_a_directory_is_one_target_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, intermediate_size=48)).save_pretrained(tmp_path / "eos")
    monkeypatch.chdir(tmp_path)

    versions = {
        read_target_facts(TargetSection(model=name)).version for name in ("eos", "./eos", str(tmp_path / "eos"))
    }

    assert len(versions) == 1


# --- the weights' size ------------------------------------------------------------------------------------------------


def test_weights_are_counted_from_their_headers(tmp_path: Path) -> None:
    """Packed integers and fp8 stay as they are; what is in floating point takes the dtype it is loaded in."""
    save_file({"a": torch.zeros(10, 4), "b": torch.zeros(8, dtype=torch.bfloat16)}, tmp_path / "model-1.safetensors")
    save_file({"c": torch.zeros(6, dtype=torch.int32)}, tmp_path / "model-2.safetensors")

    assert weight_bytes(TargetSection(model=str(tmp_path)), torch.bfloat16) == (40 + 8) * 2 + 6 * 4


def test_the_experts_count_where_there_are_no_files(tmp_path: Path) -> None:
    """Qwen3-30B-A3B, whose files have 61.07 GB."""
    config = Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        tie_word_embeddings=False,
    )
    config.save_pretrained(tmp_path)

    assert weight_bytes(TargetSection(model=str(tmp_path)), torch.bfloat16) == pytest.approx(61.07e9, rel=0.01)
