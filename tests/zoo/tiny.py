"""Tiny configs and models of any architecture of transformers: the sizes that configs spell in many ways, all small."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from disagg_core.target.facts import model_class

VOCAB, HIDDEN, LAYERS = 96, 32, 6

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "image_token_id": 90,
    "video_token_id": 91,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 16,
    "moe_ffn_hidden_size": 16,
    "expert_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "intermediate_size_mlp": 48,
    "ffn_hidden_size": 48,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    # recurrent layers
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_expand": 2,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1,
    "n_groups": 1,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "n_mamba_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "sliding_window": 16,
    "attention_chunk_size": 16,
    # per-layer embeddings
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "num_kv_shared_layers": 2,
    "global_head_dim": 16,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "embed_dim": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_layers": 1,
    "num_global_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "attention_heads": 2,
    "num_heads": 2,
    "head_dim": 8,
    "out_hidden_size": HIDDEN,
    "output_hidden_size": HIDDEN,
    "vision_output_dim": HIDDEN,
    "image_size": 28,
    "patch_size": 14,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
    "intermediate_layers_indices": [0],
    "conf_num_hidden_layers": 1,
    "conf_num_attention_heads": 2,
}


def _known(kind: type[PreTrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    fields = {*getattr(kind, "__dataclass_fields__", {}), *kind.attribute_map, "eos_token_id"}
    return {key: value for key, value in values.items() if key in fields}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The config of `model_type` in tiny sizes; `changes` are of the text model where it stands in a wrapper."""
    kind = CONFIG_MAPPING[model_type]
    parts = kind.sub_configs or {}
    if "text_config" not in parts:
        return kind(**_known(kind, _TEXT) | changes)
    top = {key: value for key, value in _known(kind, _TEXT).items() if key in ("image_token_id", "video_token_id")}
    sections: dict[str, Any] = {}
    for name, part in parts.items():
        values = _TEXT if name == "text_config" else _VISION
        known = values if "__dataclass_fields__" not in part.__dict__ else _known(part, values)
        sections[name] = known | (changes if name == "text_config" else {})
    return kind(**top, **sections)


def tiny_model(config: PreTrainedConfig) -> nn.Module:
    """A model of `config` with random fp32 weights, the same each time; of a wrapper the whole, as it is published."""
    torch.manual_seed(0)
    wrapped = config.get_text_config() is not config and type(config) in AutoModelForImageTextToText._model_mapping
    auto = AutoModelForImageTextToText if wrapped else model_class(config)
    return auto.from_config(config).float().eval().requires_grad_(False)
