"""One optimizer step of the EAGLE-3 draft on CPU beside the plain eager formula: CPU time, peak memory, equal losses.

    python -m tests.benchmarks.bench_eagle3 [--point narrow|wide|all] [--rounds 5] [--threads 1]

Points, fp32: narrow is H=256, V=K=4096, T=512, B=2, L=7; wide is H=256, V=128,000, K=32,000, T=1024, B=1, L=7. Two
kinds of batches: "prompts" masks the first 3/8 of the tokens, and the second sample is a quarter shorter; "all live"
has neither padding nor prompt. Both implementations step in turns in one process; time is CPU time of the process, so
that other work on the machine counts for neither. Peak memory is measured in a process for each: the high-water mark
of two steps above what the process held with model and batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from disagg_core.drafts.eagle3 import Eagle3Config, Eagle3Draft, Eagle3Loss
from disagg_core.drafts.eagle3.options import LossSection
from disagg_core.drafts.vocab import VocabMap
from tests.benchmarks.baselines.eager_eagle3 import eager_training_time_test

STEPS = 7


@dataclass(frozen=True)
class Point:
    vocab: int
    draft_vocab: int
    tokens: int
    batch: int
    hidden: int = 256


POINTS = {"narrow": Point(4096, 4096, 512, 2), "wide": Point(128_000, 32_000, 1024, 1)}
WANTED = {"narrow": "time <= 0.6, peak <= 0.5", "wide": "peak <= 0.25"}


class Case:
    """A draft, its optimizer and a batch; `step` trains once and returns the loss."""

    def __init__(self, point: Point, kind: str, variant: str) -> None:
        torch.manual_seed(0)
        config = Eagle3Config.from_dict(
            {
                "hidden_size": point.hidden,
                "intermediate_size": 688,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": point.vocab,
                "draft_vocab_size": point.draft_vocab,
                "max_position_embeddings": 2048,
            }
        )
        draft = Eagle3Draft(config)
        draft.set_embedding(torch.randn(point.vocab, point.hidden))
        if point.vocab != point.draft_vocab:
            draft.set_vocab_map(VocabMap.from_counts(torch.rand(point.vocab), point.draft_vocab))
        self.head = torch.randn(point.vocab, point.hidden) * 0.05
        self.batch = make_batch(point, kind)
        self.draft = draft
        self.fused = Eagle3Loss(draft, self.head, LossSection(), STEPS)
        self.variant = variant
        trained = [p for p in draft.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self) -> float:
        if self.variant == "eager":
            total = eager_training_time_test(self.draft, self.batch, lm_head=self.head, ttt_length=STEPS).total
        else:
            total = self.fused(self.batch).total
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(total.detach())


def make_batch(point: Point, kind: str) -> dict[str, Tensor]:
    lengths = (
        [point.tokens, point.tokens * 3 // 4][: point.batch] if kind == "prompts" else [point.tokens] * point.batch
    )
    attention_mask = (torch.arange(point.tokens)[None] < torch.tensor(lengths)[:, None]).long()
    prompt = point.tokens * 3 // 8 if kind == "prompts" else 0
    return {
        "input_ids": torch.randint(0, point.vocab, (point.batch, point.tokens)) * attention_mask,
        "attention_mask": attention_mask,
        "loss_mask": attention_mask * (torch.arange(point.tokens)[None] >= prompt),
        "aux_hidden_states": torch.randn(point.batch, point.tokens, 3 * point.hidden),
        "last_hidden_state": torch.randn(point.batch, point.tokens, point.hidden),
    }


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure_peak(point: str, kind: str, variant: str) -> int:
    """Bytes of the high-water mark of two steps above model and batch; run in a process of its own."""
    case = Case(POINTS[point], kind, variant)
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts over
    case.step()
    case.step()
    return status_bytes("VmHWM") - before


def peak_of(point: str, kind: str, variant: str, threads: int) -> int:
    command = [sys.executable, "-m", "tests.benchmarks.bench_eagle3", "--threads", str(threads)]
    found = subprocess.run([*command, "--peak", point, kind, variant], check=True, capture_output=True, text=True)
    return int(json.loads(found.stdout.splitlines()[-1]))


def cpu_seconds(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def bench(point: str, kind: str, rounds: int, threads: int) -> None:
    cases = {variant: Case(POINTS[point], kind, variant) for variant in ("eager", "fused")}
    losses = {variant: case.step() for variant, case in cases.items()}  # and warm up
    seconds: dict[str, list[float]] = {"eager": [], "fused": []}
    for _ in range(rounds):
        for variant, case in cases.items():
            seconds[variant].append(cpu_seconds(case.step))
    ratios = [fused / eager for fused, eager in zip(seconds["fused"], seconds["eager"], strict=True)]
    time_of = {variant: statistics.median(values) for variant, values in seconds.items()}
    peak = {variant: peak_of(point, kind, variant, threads) / 2**20 for variant in cases}
    apart = abs(losses["fused"] - losses["eager"]) / losses["eager"]
    print(
        f"{point:<7} {kind:<9} {time_of['eager']:>8.3f} {time_of['fused']:>8.3f} {statistics.median(ratios):>7.2f}"
        f" {peak['eager']:>9.0f} {peak['fused']:>9.0f} {peak['fused'] / peak['eager']:>7.2f} {apart:>12.1e}"
        f"   {WANTED[point]}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--point", choices=[*POINTS, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(json.dumps(measure_peak(*options.peak)))
        return
    print(f"torch {torch.__version__}, {options.threads} thread(s), median of {options.rounds} rounds")
    print("                  CPU seconds a step           MiB above model            loss apart")
    print("point   batch        eager    fused   ratio     eager     fused   ratio   (relative)   wanted")
    for point in POINTS if options.point == "all" else [options.point]:
        for kind in ("prompts", "all live"):
            bench(point, kind, options.rounds, options.threads)


if __name__ == "__main__":
    main()
