"""Two implementations of a training step beside each other on the CPU: CPU time, peak memory, equal losses.

Both step in turns in one process; time is CPU time of the process, so that other work on the machine counts for
neither. Peak memory is measured in a process for each: the high-water mark of two steps above what the process held
with model and batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

VARIANTS = ("eager", "fused")
KINDS = ("prompts", "all live")
"""Batches: "prompts" masks the first 3/8 of the tokens, and the second sample is a quarter shorter; "all live" has
neither padding nor prompt."""


class Case:
    """A draft in training and one of the two ways to its loss; `step` trains once and returns the loss."""

    def __init__(self, parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor]) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)
        self._loss = loss

    def step(self) -> float:
        loss = self._loss()
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


Make = Callable[[str, str], Case]
"""Makes the case of a kind of batch and a variant."""


def lengths_of(kind: str, tokens: int, batch: int = 2) -> list[int]:
    return [tokens, tokens * 3 // 4][:batch] if kind == "prompts" else [tokens] * batch


def masks_of(kind: str, tokens: int, batch: int = 2) -> list[Tensor]:
    """The loss mask of each sample."""
    masks = [torch.ones(length, dtype=torch.uint8) for length in lengths_of(kind, tokens, batch)]
    for mask in masks:
        mask[: tokens * 3 // 8 if kind == "prompts" else 0] = 0
    return masks


def main(module: str, doc: str | None, makes: Mapping[str, Make], wanted: Mapping[str, str]) -> None:
    """Compare the variants of every point in `makes`, or of the one that is asked for."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--point", choices=[*makes, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        point, kind, variant = options.peak
        print(json.dumps(measure_peak(makes[point], kind, variant)))
        return
    print(f"torch {torch.__version__}, {options.threads} thread(s), median of {options.rounds} rounds")
    print("                    CPU seconds a step           MiB above model            loss apart")
    print("point    batch        eager    fused   ratio     eager     fused   ratio   (relative)   wanted")
    for point in makes if options.point == "all" else [options.point]:
        for kind in KINDS:
            line = compare(
                makes[point],
                kind,
                options.rounds,
                lambda kind, variant, point=point: peak_of(module, point, kind, variant, options.threads),
            )
            print(f"{point:<8} {kind:<9} {line}   {wanted[point]}", flush=True)


def compare(make: Make, kind: str, rounds: int, peak_of: Callable[[str, str], int]) -> str:
    cases = {variant: make(kind, variant) for variant in VARIANTS}
    losses = {variant: case.step() for variant, case in cases.items()}  # and warm up
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant, case in cases.items():
            seconds[variant].append(cpu_seconds(case.step))
    ratios = [fused / eager for fused, eager in zip(seconds["fused"], seconds["eager"], strict=True)]
    time_of = {variant: statistics.median(values) for variant, values in seconds.items()}
    peak = {variant: peak_of(kind, variant) / 2**20 for variant in VARIANTS}
    apart = abs(losses["fused"] - losses["eager"]) / losses["eager"]
    return (
        f"{time_of['eager']:>8.3f} {time_of['fused']:>8.3f} {statistics.median(ratios):>7.2f}"
        f" {peak['eager']:>9.0f} {peak['fused']:>9.0f} {peak['fused'] / peak['eager']:>7.2f} {apart:>12.1e}"
    )


def cpu_seconds(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def peak_of(module: str, point: str, kind: str, variant: str, threads: int) -> int:
    command = [sys.executable, "-m", module, "--threads", str(threads), "--peak", point, kind, variant]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(json.loads(found.stdout.splitlines()[-1]))


def measure_peak(make: Make, kind: str, variant: str) -> int:
    """Bytes of the high-water mark of two steps above model and batch; run in a process of its own."""
    case = make(kind, variant)
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts over
    case.step()
    case.step()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
