"""The architectures that are tried: one line each. A new class of a new release of transformers joins by one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """One architecture of transformers: a `model_type`, and what of its tiny config must not be the usual sizes."""

    model_type: str
    title: str
    changes: dict[str, Any] = field(default_factory=dict)
    unfit: str | None = None
    """Why its weights cannot be used, as the check of a run's target says it."""
    built: bool = True
    """Whether a tiny model can be built; where not, only the config is tried."""


LATENT = {"num_key_value_heads": 4}
"""Latent attention has as many key and value heads as query heads."""
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}}
HALF_SECTIONS = {"rope_parameters": {**SECTIONS["rope_parameters"], "mrope_section": [1, 1]}}
GEMMA_4 = {"layer_types": ["sliding_attention", "full_attention"] * 3, "final_logit_softcapping": 30.0}

ARCHITECTURES = (
    Architecture("llama", "Llama 2, 3"),
    Architecture("llama4", "Llama 4"),
    Architecture("llama4_text", "Llama 4, text"),
    Architecture("mllama", "Llama 3.2 Vision"),
    Architecture("mistral", "Mistral"),
    Architecture("mistral3", "Mistral Small 3.1"),
    Architecture("ministral3", "Ministral 3"),
    Architecture("mistral4", "Mistral 4", LATENT),
    Architecture("mixtral", "Mixtral"),
    Architecture("qwen2", "Qwen2, Qwen2.5"),
    Architecture("qwen2_moe", "Qwen2-MoE"),
    Architecture("qwen2_5_vl", "Qwen2.5-VL", SECTIONS),
    Architecture("qwen3", "Qwen3"),
    Architecture("qwen3_moe", "Qwen3-MoE"),
    Architecture("qwen3_next", "Qwen3-Next"),
    Architecture("qwen3_5", "Qwen3.5"),
    Architecture("qwen3_5_text", "Qwen3.5, text"),
    Architecture("qwen3_5_moe", "Qwen3.5-MoE"),
    Architecture("qwen3_vl", "Qwen3-VL"),
    Architecture("qwen3_vl_moe", "Qwen3-VL-MoE"),
    Architecture("gemma", "Gemma"),
    Architecture("gemma2", "Gemma 2", {"final_logit_softcapping": 30.0}),
    Architecture("gemma3", "Gemma 3"),
    Architecture("gemma3_text", "Gemma 3, text"),
    Architecture("gemma3n", "Gemma 3n", built=False),
    Architecture("gemma4", "Gemma 4", {"num_kv_shared_layers": 0, "pad_token_id": 0}),
    Architecture("gemma4_text", "Gemma 4, text", GEMMA_4),
    Architecture("phi", "Phi-2", unfit="the LM head lm_head.weight has a bias; drafts of such targets cannot train"),
    Architecture(
        "phi3",
        "Phi-3, Phi-4",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 64,
                "short_factor": [1.0] * 3,
                "long_factor": [2.0] * 3,
                "partial_rotary_factor": 0.75,
            }
        },
    ),
    Architecture("phimoe", "Phi-3.5-MoE"),
    Architecture("glm", "GLM-4 (2024)"),
    Architecture("glm4", "GLM-4"),
    Architecture("glm4_moe", "GLM-4-MoE"),
    Architecture("glm4_moe_lite", "GLM-4.7-Flash", LATENT),
    Architecture("glm4v", "GLM-4V", SECTIONS),
    Architecture("glm4v_moe", "GLM-4.5V", HALF_SECTIONS),
    Architecture("deepseek_v2", "DeepSeek-V2", LATENT),
    Architecture("deepseek_v3", "DeepSeek-V3, Kimi-K2", LATENT),
    Architecture("deepseek_v4", "DeepSeek-V4", built=False),
    Architecture("kimi_k25", "Kimi-K2.5", LATENT),
    Architecture("kimi_linear", "Kimi-Linear", LATENT),
    Architecture("gpt_oss", "gpt-oss"),
    Architecture("olmo2", "OLMo 2"),
    Architecture("olmo3", "OLMo 3"),
    Architecture("granite", "Granite", {"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    Architecture("granitemoe", "Granite-MoE", {"logits_scaling": 6.0}),
    Architecture(
        "granitemoehybrid", "Granite 4 hybrid", {"logits_scaling": 6.0, "layer_types": ["mamba"] * 5 + ["attention"]}
    ),
    Architecture("falcon_h1", "Falcon-H1", {"lm_head_multiplier": 0.25}),
    Architecture("lfm2", "LFM2", {"layer_types": ["conv", "conv", "full_attention"] * 2}),
    Architecture("llava", "Llava"),
    Architecture("internvl", "InternVL"),
    Architecture("idefics3", "Idefics3"),
    Architecture("smolvlm", "SmolVLM"),
    Architecture("starcoder2", "StarCoder2"),
    Architecture("gpt_neox", "GPT-NeoX, Pythia"),
    Architecture("gpt2", "GPT-2"),
    Architecture("opt", "OPT"),
    Architecture("bloom", "BLOOM"),
    Architecture("falcon", "Falcon"),
    Architecture("stablelm", "StableLM"),
    Architecture("smollm3", "SmolLM3"),
    Architecture("cohere", "Command R"),
    Architecture("aya_vision", "Aya Vision"),
    Architecture("cohere2", "Command R7B, Command A"),
    Architecture("exaone4", "EXAONE 4"),
    Architecture("ernie4_5", "ERNIE 4.5"),
    Architecture("ernie4_5_moe", "ERNIE 4.5 MoE"),
    Architecture("hunyuan_v1_dense", "Hunyuan"),
    Architecture("hyperclovax", "HyperCLOVA X", {"logits_scaling": 0.5}),
    Architecture("seed_oss", "Seed-OSS"),
    Architecture("minimax_m2", "MiniMax-M2"),
    Architecture("minicpm3", "MiniCPM3", {**LATENT, "dim_model_base": 8}),
    Architecture("nemotron", "Nemotron"),
    Architecture("nemotron_h", "Nemotron-H", {"layers_block_type": ["mamba", "attention", "moe"] * 2}),
    Architecture("bamba", "Bamba", {"attn_layer_indices": [1, 3, 5]}),
    Architecture("jamba", "Jamba"),
    Architecture("recurrent_gemma", "RecurrentGemma", {"logits_soft_cap": 30.0}),
    Architecture("dots1", "dots.llm1"),
    Architecture("apertus", "Apertus"),
    Architecture("longcat_flash", "LongCat-Flash", {**LATENT, "num_layers": 6, "num_hidden_layers": 12}),
    Architecture("bart", "BART (encoder and decoder)", built=False),
)
