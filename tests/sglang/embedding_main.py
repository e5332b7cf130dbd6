"""Run in SGLang's environment: writes what its models of Gemma say about drafts of blocks, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from sglang.srt.models import gemma3_causal, gemma4_causal, qwen3

CAPTURES = "set_dflash_layers_to_capture"

embedding = gemma4_causal.Gemma4TextScaledWordEmbedding(4, 64, 0, embed_scale=64**0.5)
with torch.no_grad():
    factor = embedding(torch.tensor([1])) / embedding.weight[1]
Path(sys.argv[1]).write_text(
    json.dumps(
        {
            "factor": [float(factor.min()), float(factor.max())],
            "gemma4": hasattr(gemma4_causal.Gemma4ForCausalLM, CAPTURES),
            "gemma3": hasattr(gemma3_causal.Gemma3ForCausalLM, CAPTURES),
            "qwen3": hasattr(qwen3.Qwen3ForCausalLM, CAPTURES),
        }
    )
)
