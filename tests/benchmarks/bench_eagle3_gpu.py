"""One training step of a Qwen3-8B draft on a GPU: step time, tokens/s, peak memory and model FLOPs utilisation.

    python -m tests.benchmarks.bench_eagle3_gpu --peak-tflops 989 [--batch 4] [--tokens 2048] [--steps 20]

Shapes: hidden 4096, 32 query and 8 key heads of 128, MLP 12288, V=151,936, K=32,000, L=7, bf16 compute with fp32
masters, AdamW included. Variants: the plain eager formula, the fused implementation, and the fused one compiled, each
with and without activation checkpointing. `--peak-tflops` is the card's dense bf16 peak (H100/H200 SXM: 989).

Model FLOPs are those of the formula on the rows that have work, 6 per weight and row (2 for the frozen teacher), with
the causal half of the attention; recomputation and rows without work do not count as utilisation.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from disagg_core.drafts.eagle3 import Eagle3Batch, Eagle3Config, Eagle3Draft, Eagle3Loss
from disagg_core.drafts.eagle3.options import LossSection
from disagg_core.drafts.vocab import VocabMap
from tests.benchmarks.baselines.eager_eagle3 import eager_training_time_test

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB, DRAFT_VOCAB, STEPS = 4096, 32, 8, 128, 12288, 151_936, 32_000, 7


def make_draft() -> Eagle3Draft:
    config = Eagle3Config.from_dict(
        {
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "vocab_size": VOCAB,
            "draft_vocab_size": DRAFT_VOCAB,
            "max_position_embeddings": 40_960,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
        }
    )
    draft = Eagle3Draft(config)
    draft.set_vocab_map(VocabMap.from_counts(torch.arange(VOCAB, 0, -1), DRAFT_VOCAB))
    draft.set_embedding(torch.randn(VOCAB, HIDDEN).bfloat16())
    return draft.cuda()


def make_batch(batch: int, tokens: int) -> Eagle3Batch:
    ones = torch.ones(batch, tokens, dtype=torch.bool)
    return Eagle3Batch(
        input_ids=torch.randint(0, VOCAB, (batch, tokens)),
        attention_mask=ones,
        loss_mask=ones,
        aux_hidden_states=torch.randn(batch, tokens, 3 * HIDDEN).bfloat16(),
        last_hidden_state=torch.randn(batch, tokens, HIDDEN).bfloat16(),
    ).to("cuda")


def model_flops(batch: int, tokens: int) -> float:
    """FLOPs of one step's forward and backward pass, all rows live."""
    rows = batch * tokens
    projections = 2 * HIDDEN * HEAD_DIM * (HEADS + 2 * KV_HEADS) + HEADS * HEAD_DIM * HIDDEN
    layer = projections + 3 * HIDDEN * MLP + DRAFT_VOCAB * HIDDEN
    attention = 6 * batch * tokens * tokens * HEADS * HEAD_DIM  # forward and backward, causal half of 12
    teacher = 2 * rows * HIDDEN * VOCAB
    return teacher + 6 * rows * 3 * HIDDEN * HIDDEN + STEPS * (6 * rows * layer + attention)


def variant(name: str, head: Tensor) -> tuple[Callable[[Eagle3Batch], Tensor], Eagle3Draft]:
    """Return the function from batch to loss, and the draft that it trains."""
    draft = make_draft()
    if name == "eager":

        def eager(batch: Eagle3Batch) -> Tensor:
            tensors = {key: value.cuda() for key, value in vars(batch).items()}
            with torch.autocast("cuda", torch.bfloat16):
                return eager_training_time_test(draft, tensors, lm_head=head, ttt_length=STEPS).total

        return eager, draft
    module = Eagle3Loss(draft, head, LossSection(), STEPS, activation_checkpointing=name.endswith("checkpointed"))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    fully_shard(module, mesh=init_device_mesh("cuda", (1,)), mp_policy=policy, ignored_params=frozen)
    if name.startswith("compiled"):
        module.compile(dynamic=True)
    return lambda batch: module(batch).total, draft


def measure(name: str, head: Tensor, options: argparse.Namespace) -> None:
    run, draft = variant(name, head)
    optimizer = torch.optim.AdamW([p for p in draft.parameters() if p.requires_grad], lr=1e-4, fused=True)
    batch = make_batch(options.batch, options.tokens)

    def step() -> Tensor:
        total = run(batch)
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.detach()

    try:
        loss = float(step())
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for _ in range(options.steps):
            step()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        print(f"{name:<24} out of memory")
        return
    seconds = (time.perf_counter() - began) / options.steps
    used = model_flops(options.batch, options.tokens) / seconds / (options.peak_tflops * 1e12)
    print(
        f"{name:<24} {seconds * 1e3:>9.1f} {options.batch * options.tokens / seconds:>10,.0f}"
        f" {torch.cuda.max_memory_allocated() / 2**30:>9.1f} {used:>6.1%} {loss:>10.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak-tflops", type=float, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
    head = torch.randn(VOCAB, HIDDEN, device="cuda", dtype=torch.bfloat16) * 0.02
    card = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{card}, batch {options.batch} x {options.tokens}, L={STEPS}")
    print("variant                    ms/step   tokens/s  peak GiB    MFU       loss")
    for name in ("eager", "fused", "fused, checkpointed", "compiled", "compiled, checkpointed"):
        torch.manual_seed(0)
        measure(name, head, options)
        gc.collect()
        torch.cuda.empty_cache()  # between variants, not in a step
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
