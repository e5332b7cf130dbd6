"""One optimizer step of the DFlash draft on CPU beside the plain eager formula: CPU time, peak memory, equal losses.

    python -m tests.benchmarks.bench_dflash [--rounds 5] [--threads 1]

fp32, H=256, V=4096, T=512, B=2, 64 anchors x 16 slots, 5 layers. Two kinds of batches: "prompts" masks the first 3/8 of
the tokens, and the second sample is a quarter shorter; "all live" has neither padding nor prompt. Both implementations
step in turns in one process; time is CPU time of the process, so that other work on the machine counts for neither.
Peak memory is measured in a process for each: the high-water mark of two steps above what the process held with model
and batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from disagg_core.drafts.dflash.batch import DFlashBatch, DFlashBatcher
from disagg_core.drafts.dflash.config import DFlashConfig
from disagg_core.drafts.dflash.loss import DFlashLoss
from disagg_core.drafts.dflash.model import DFlashDraft
from disagg_core.drafts.dflash.options import DFlashSection, default_gamma
from disagg_core.drafts.method import FrozenParts, Sample
from tests.benchmarks.baselines.eager_dflash import eager_dflash

HIDDEN, VOCAB, TOKENS, SIZE, LAYERS = 256, 4096, 512, 16, 5
OPTIONS = DFlashSection(anchors=64, block_size=SIZE)
WANTED = "time <= 0.7, peak <= 0.3"


class Case:
    """A draft, its optimizer and a batch; `step` trains once and returns the loss."""

    def __init__(self, kind: str, variant: str) -> None:
        torch.manual_seed(0)
        config = DFlashConfig.from_dict(
            {
                "hidden_size": HIDDEN,
                "intermediate_size": 688,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": VOCAB,
                "block_size": SIZE,
                "mask_token_id": VOCAB - 1,
                "target_layer_ids": list(range(LAYERS)),
            }
        )
        self.draft = DFlashDraft(config)
        parts = FrozenParts(torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN) * 0.05)
        self.draft.attach(parts)
        batcher = DFlashBatcher(OPTIONS, config, seed=0)
        self.batch = make_batch(batcher, kind)
        self.normalisers = {n: torch.tensor(v) for n, v in batcher.normalisers(self.batch).items()}
        self.fused = DFlashLoss(self.draft, parts, OPTIONS.loss, activation_checkpointing=False)
        self.variant = variant
        trained = [p for p in self.draft.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self) -> float:
        if self.variant == "eager":
            names = ("input_ids", "loss_mask", "hidden_states", "anchors", "block_keep")
            inputs = {name: getattr(self.batch, name) for name in names}
            loss = eager_dflash(self.draft, inputs, gamma=default_gamma(SIZE)).loss
        else:
            loss = self.fused(self.batch, self.normalisers).total
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def make_batch(batcher: DFlashBatcher, kind: str) -> DFlashBatch:
    samples = []
    for index, length in enumerate([TOKENS, TOKENS * 3 // 4] if kind == "prompts" else [TOKENS, TOKENS]):
        mask = torch.ones(length, dtype=torch.uint8)
        if kind == "prompts":
            mask[: TOKENS * 3 // 8] = 0
        tensors = {
            "input_ids": torch.randint(0, VOCAB - 1, (length,), dtype=torch.int32),
            "loss_mask": mask,
            "aux_hidden_states": torch.randn(length, LAYERS * HIDDEN),
        }
        samples.append(Sample(f"s{index}", tensors))
    return batcher.collate(samples)


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure_peak(kind: str, variant: str) -> int:
    """Bytes of the high-water mark of two steps above model and batch; run in a process of its own."""
    case = Case(kind, variant)
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts over
    case.step()
    case.step()
    return status_bytes("VmHWM") - before


def peak_of(kind: str, variant: str, threads: int) -> int:
    command = [sys.executable, "-m", "tests.benchmarks.bench_dflash", "--threads", str(threads)]
    found = subprocess.run([*command, "--peak", kind, variant], check=True, capture_output=True, text=True)
    return int(json.loads(found.stdout.splitlines()[-1]))


def cpu_seconds(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def bench(kind: str, rounds: int, threads: int) -> None:
    cases = {variant: Case(kind, variant) for variant in ("eager", "fused")}
    losses = {variant: case.step() for variant, case in cases.items()}  # and warm up
    seconds: dict[str, list[float]] = {"eager": [], "fused": []}
    for _ in range(rounds):
        for variant, case in cases.items():
            seconds[variant].append(cpu_seconds(case.step))
    ratios = [fused / eager for fused, eager in zip(seconds["fused"], seconds["eager"], strict=True)]
    time_of = {variant: statistics.median(values) for variant, values in seconds.items()}
    peak = {variant: peak_of(kind, variant, threads) / 2**20 for variant in cases}
    apart = abs(losses["fused"] - losses["eager"]) / losses["eager"]
    print(
        f"{kind:<9} {time_of['eager']:>8.3f} {time_of['fused']:>8.3f} {statistics.median(ratios):>7.2f}"
        f" {peak['eager']:>9.0f} {peak['fused']:>9.0f} {peak['fused'] / peak['eager']:>7.2f} {apart:>12.1e}   {WANTED}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(measure_peak(*options.peak)))
        return
    print(f"torch {torch.__version__}, {options.threads} thread(s), median of {options.rounds} rounds")
    print("          CPU seconds a step           MiB above model            loss apart")
    print("batch        eager    fused   ratio     eager     fused   ratio   (relative)   wanted")
    for kind in ("prompts", "all live"):
        bench(kind, options.rounds, options.threads)


if __name__ == "__main__":
    main()
