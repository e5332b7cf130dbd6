"""Seconds of an evaluation: 16 prompts of 5 to 40 tokens, 64 new tokens, a target of 4 layers and width 96, one thread.

Run with ``python -m tests.benchmarks.bench_evaluation``.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from disagg_core.drafts.eagle3 import Eagle3Draft
from disagg_core.evaluation import measure_accept_length


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 512,
    }
    target = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4, initializer_range=0.1)).eval()
    draft = Eagle3Draft({**sizes, "initializer_range": 0.1})
    draft.set_embedding(target.get_input_embeddings().weight)
    prompts = [torch.randint(3, 1024, (int(length),)).tolist() for length in torch.linspace(5, 40, 16)]
    print(f"{'batch':>5} {'speculative s':>14} {'plain s':>8} {'accept length':>14} {'lossless':>9}")
    for batch in (1, 4, 16):
        found = measure_accept_length(target, draft, prompts, draft_tokens=5, max_new_tokens=64, batch_size=batch)
        print(
            f"{batch:>5} {found.seconds:>14.2f} {found.plain_seconds:>8.2f} {found.accept_length:>14.3f} "
            f"{found.lossless!s:>9}"
        )


if __name__ == "__main__":
    main()
