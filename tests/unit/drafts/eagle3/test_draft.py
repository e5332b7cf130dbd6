"""The draft itself: config, RoPE, and decoding with its cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from disagg_core.drafts.eagle3 import Eagle3Config, Eagle3Draft, training_time_test
from disagg_core.drafts.eagle3.method import Eagle3
from disagg_core.drafts.eagle3.options import Eagle3Section
from disagg_core.drafts.method import FrozenParts
from disagg_core.drafts.rope import inverse_frequencies
from disagg_core.drafts.vocab import VocabMap
from disagg_core.errors import IncompatibleDraft
from tests.unit.drafts.eagle3.cases import small_batch, small_config, small_draft, target_head

pytestmark = pytest.mark.unit

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.5},
    {"type": "dynamic", "factor": 3.0},
    {"rope_type": "llama3", **LLAMA3},
    YARN,
    {**YARN, "attention_factor": 0.7, "beta_fast": 16, "beta_slow": 2},
    {**YARN, "mscale": 0.9, "mscale_all_dim": 0.6},
    {**YARN, "truncate": False},
]


@pytest.mark.parametrize("scaling", ROPES)
@pytest.mark.parametrize("seq_len", [20, 200])
def test_rope_frequencies_are_those_of_hugging_face(scaling: dict[str, Any], seq_len: int) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32, "max_position_embeddings": 128}
    theirs = LlamaConfig(**sizes, rope_parameters={"rope_theta": 5000.0, **scaling})
    kind = scaling.get("rope_type") or scaling["type"]
    expected, expected_scaling = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", seq_len=seq_len)

    ours = small_config(**sizes, rope_theta=5000.0, rope_scaling=scaling)
    found, found_scaling = inverse_frequencies(ours, seq_len)

    torch.testing.assert_close(found, expected.float(), atol=0, rtol=1e-6)
    assert found_scaling == pytest.approx(expected_scaling)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": 10, "num_attention_heads": 6, "num_key_value_heads": 3},
        {"target_hidden_size": 20, "hidden_size": 12, "fc_norm": True},
        *({"rope_scaling": scaling} for scaling in ROPES),
    ],
)
def test_chain_decoding_with_the_cache_gives_the_logits_of_every_test_step(changes: dict[str, Any]) -> None:
    draft, length, steps = small_draft(**changes), 11, 5
    batch = small_batch(draft, [length])
    with torch.no_grad():
        expected = training_time_test(
            draft, batch, lm_head=target_head(draft), ttt_length=steps, return_logits=True
        ).logits
        assert expected is not None
        for start in range(length - steps):
            cache = draft.new_cache(1)
            ids = batch["input_ids"][:, 1:]
            prefix = slice(0, start + 1)
            state = draft.project_aux(batch["aux_hidden_states"][:, prefix])
            logits, states = draft.decode(state, ids[:, prefix], torch.arange(start + 1)[None], cache)
            torch.testing.assert_close(logits, expected[0][:, prefix], atol=1e-5, rtol=0)
            last = states[:, -1:]
            for k in range(1, steps):
                position = torch.tensor([[start + k]])
                logits, last = draft.decode(last, ids[:, start + k : start + k + 1], position, cache)
                torch.testing.assert_close(logits[0, 0], expected[k][0, start], atol=1e-5, rtol=0)


def test_decoding_a_padded_batch_is_decoding_each_prompt() -> None:
    draft = small_draft()
    batch = small_batch(draft, [5, 9])
    positions = torch.arange(9).expand(2, 9).masked_fill(batch["attention_mask"] == 0, -1)
    with torch.no_grad():
        states = draft.project_aux(batch["aux_hidden_states"])
        together, _ = draft.decode(states, batch["input_ids"], positions, draft.new_cache(2))
        alone, _ = draft.decode(states[:1, :5], batch["input_ids"][:1, :5], positions[:1, :5], draft.new_cache(1))
    torch.testing.assert_close(together[:1, :5], alone, atol=1e-5, rtol=0)
    assert torch.isfinite(together).all()


def test_a_cropped_cache_continues_as_if_the_dropped_tokens_had_not_been() -> None:
    draft = small_draft()
    batch = small_batch(draft, [8])
    states, ids, positions = draft.project_aux(batch["aux_hidden_states"]), batch["input_ids"], torch.arange(8)[None]
    with torch.no_grad():
        once = draft.new_cache(1)
        expected, _ = draft.decode(states, ids, positions, once)
        again = draft.new_cache(1)
        draft.decode(states[:, :6], ids[:, :6], positions[:, :6], again)
        again.crop(3)
        found, _ = draft.decode(states[:, 3:], ids[:, 3:], positions[:, 3:], again)
    assert again.length == once.length == 8
    torch.testing.assert_close(found, expected[:, 3:], atol=1e-5, rtol=0)


def test_a_config_survives_the_serving_format() -> None:
    config = small_config(
        rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3}, fc_norm=True, eos_token_id=[1, 2]
    )
    values = config.to_dict()
    assert values["rope_theta"] == 5e5
    assert values["rope_scaling"]["rope_type"] == values["rope_parameters"]["rope_type"] == "llama3"
    assert values["architectures"] == ["LlamaForCausalLMEagle3"]
    assert "norm_output" not in values
    assert Eagle3Config.from_dict(values) == config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers"),
        ({"attention_bias": True}, "attention_bias"),
        ({"norm_output": True}, "norm_output"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"draft_vocab_size": 41}, "draft_vocab_size"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ],
)
def test_a_config_that_would_compute_something_else_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(IncompatibleDraft, match=named):
        small_config(**changes)


def test_keys_of_trainers_and_libraries_are_ignored() -> None:
    assert small_config(lk_loss_type="alpha", ploss_decay=0.8, torch_dtype="bfloat16") == small_config()


def test_the_serving_tensors_leave_out_the_target_embedding_and_name_what_does_not_fit() -> None:
    draft = small_draft()
    state = draft.serving_state_dict()
    assert "embed_tokens.weight" not in state
    assert {"d2t", "t2d", "fc.weight", "midlayer.self_attn.q_proj.weight"} <= state.keys()

    fresh = Eagle3Draft(draft.config)
    fresh.load_serving_state_dict(state)
    assert torch.equal(fresh.lm_head.weight, draft.lm_head.weight)
    assert torch.equal(fresh.t2d, draft.t2d)

    state["fc.weight"] = state["fc.weight"][:, :3]
    state["stranger"] = state.pop("norm.weight")
    with pytest.raises(IncompatibleDraft, match=r"missing norm\.weight.*unknown stranger.*fc\.weight"):
        fresh.load_serving_state_dict(state)


def test_a_draft_of_another_width_keeps_its_own_embedding() -> None:
    draft = small_draft(target_hidden_size=20)
    assert draft.config.owns_embedding
    assert "embed_tokens.weight" in draft.serving_state_dict()
    assert draft.embed_tokens.weight.requires_grad


def test_the_target_embedding_is_used_without_a_copy_and_frozen() -> None:
    draft = small_draft()
    weight = torch.randn(40, 16)
    draft.set_embedding(weight)
    assert draft.embed_tokens.weight.data_ptr() == weight.data_ptr()
    assert not draft.embed_tokens.weight.requires_grad
    with pytest.raises(IncompatibleDraft, match="owns_embedding"):
        draft.set_embedding(torch.randn(40, 12))


def test_a_fresh_drafts_head_starts_with_the_targets_rows_if_asked() -> None:
    method, config = Eagle3(), small_draft().config
    draft = method.fresh(Eagle3Section(head_init="target", vocab_size=24), config)
    with pytest.raises(IncompatibleDraft, match=r"no LM head.*attach"):
        draft.require_complete()
    embedding, head, vocab_map = torch.randn(40, 16), torch.randn(40, 16), VocabMap.from_counts(torch.arange(40), 24)
    draft.attach(FrozenParts(embedding, head, logit_scale=2.0), vocab_map)
    draft.require_complete()
    assert torch.equal(draft.lm_head.weight, head[vocab_map.target_ids] / 2.0)
    assert draft.lm_head.weight.requires_grad
    by_default = method.fresh(Eagle3Section(vocab_size=24), config)
    by_default.attach(FrozenParts(embedding, head), vocab_map)
    assert not torch.equal(by_default.lm_head.weight, head[vocab_map.target_ids])


@pytest.mark.parametrize("beside", [{"hidden_size": 64}, {"init_from": "champion"}])
def test_a_head_of_the_target_fits_only_a_fresh_draft_of_its_width(beside: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="head_init"):
        Eagle3Section(head_init="target", **beside)


def test_draft_ids_become_target_ids() -> None:
    draft = small_draft()
    vocab_map = VocabMap.from_counts(torch.arange(40) % 7, 24)
    draft.set_vocab_map(vocab_map)
    assert torch.equal(draft.to_target_ids(torch.arange(24)), vocab_map.t2d.nonzero().flatten())
    with pytest.raises(IncompatibleDraft, match="vocabulary map"):
        draft.set_vocab_map(VocabMap.identity(40))
