"""Tokens per second of an EAGLE-3 step on samples of unlike lengths: padded, sorted and padded, packed.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.bench_packing [--samples 32] [--batch 8] [--rounds 3] [--json FILE]

Lengths are log-normal from 32 to 2,048 tokens with a mean of about 500. All variants run the same kernels on the same
samples and must come to the same loss:

- padded: micro-batches in published order, every row computed, as a trainer does whose masks are on its device;
- sorted: the same, with samples of like length in a micro-batch;
- skipped: padded in published order, rows of padding left out;
- packed: samples in a row.

Seconds are CPU time of one thread, so that a busy machine changes them little; making the batch counts.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from disagg_core.drafts.eagle3 import Eagle3Config, Eagle3Draft, Eagle3Loss, loss
from disagg_core.drafts.eagle3.batcher import Eagle3Batcher
from disagg_core.drafts.eagle3.options import LossSection
from disagg_core.drafts.method import Sample
from disagg_core.drafts.vocab import VocabMap

HIDDEN, VOCAB, STEPS, SIGMA, MEAN = 64, 1024, 3, 0.9, 500
VARIANTS = ("padded", "sorted", "skipped", "packed")


@dataclass(frozen=True)
class Measured:
    """One variant: CPU seconds of a pass over all samples, its loss, and what its batches take."""

    seconds: float
    tokens_per_s: float
    loss: float
    states_mib: float
    padding: float  # part of the batches' tokens


def lengths_of(count: int) -> list[int]:
    """Return `count` lengths, the same each time."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(count, generator=generator) * SIGMA + math.log(MEAN) - SIGMA**2 / 2
    return [int(length) for length in drawn.exp().clamp(32, 2048)]


def samples_of(lengths: Sequence[int]) -> list[Sample]:
    """Return random samples, every token of which is trained on: no row but padding is left out."""
    generator = torch.Generator().manual_seed(1)
    return [
        Sample(
            f"s{number}",
            {
                "input_ids": torch.randint(0, VOCAB, (length,), generator=generator, dtype=torch.int32),
                "loss_mask": torch.ones(length, dtype=torch.uint8),
                "aux_hidden_states": torch.randn(length, 3 * HIDDEN, generator=generator),
                "last_hidden_state": torch.randn(length, HIDDEN, generator=generator),
            },
        )
        for number, length in enumerate(lengths)
    ]


@contextmanager
def every_row() -> Iterator[None]:
    """Have the step compute rows of padding too."""
    plain = loss.plan_step

    def planned(*arguments: Any, **options: Any) -> Any:
        return plain(*arguments, **{**options, "every_row": True})

    loss.plan_step = planned
    try:
        yield
    finally:
        loss.plan_step = plain


def module_of() -> tuple[Eagle3Loss, Eagle3Draft]:
    torch.manual_seed(0)
    document = {"hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN, "num_attention_heads": 4, "vocab_size": VOCAB}
    draft = Eagle3Draft(Eagle3Config.from_dict(document))
    draft.set_vocab_map(VocabMap.identity(VOCAB))
    draft.set_embedding(torch.randn(VOCAB, HIDDEN))
    return Eagle3Loss(draft, torch.randn(VOCAB, HIDDEN), LossSection(), STEPS), draft


def measure(variant: str, samples: Sequence[Sample], size: int, rounds: int) -> Measured:
    """Run all `samples` in micro-batches of `size` as one optimizer window, `rounds` times."""
    module, draft = module_of()
    batcher = Eagle3Batcher(LossSection(), HIDDEN, STEPS)
    order = sorted(samples, key=lambda sample: -len(sample)) if variant == "sorted" else list(samples)
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    collate = partial(batcher.collate, packed=variant == "packed")
    whole = sum(batcher.normalisers(collate(group))["positions"] for group in groups)
    seconds, total, held = [], 0.0, 0
    for _ in range(rounds):
        draft.zero_grad()
        total = 0.0
        began = time.process_time()
        for group in groups:
            batch = collate(group)
            held = max(held, batch.aux_hidden_states.nbytes + batch.last_hidden_state.nbytes)
            output = module(batch, normaliser=whole)
            output.total.backward()
            total += float(output.total.detach())
        seconds.append(time.process_time() - began)
    tokens = sum(map(len, samples))
    laid = sum(math.prod(collate(group).input_ids.shape) for group in groups)
    best = statistics.median(seconds)
    return Measured(best, tokens / best, total, held / 2**20, 1 - tokens / laid)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    torch.set_num_threads(1)
    samples = samples_of(lengths_of(told.samples))
    machine = f"{platform.machine()}, {platform.system()}, torch {torch.__version__}, 1 thread"
    lengths = [len(sample) for sample in samples]
    drawn = f"{min(lengths)} to {max(lengths)} tokens, mean {statistics.mean(lengths):.0f}"
    print(f"{machine}; {len(samples)} samples of {drawn}")
    print(f"{'variant':9}{'CPU s':>8}{'tokens/s':>10}{'ratio':>7}{'padding':>9}{'MiB':>7}{'loss':>11}")
    found: dict[str, Measured] = {}
    for variant in VARIANTS:
        if variant in ("padded", "sorted"):
            with every_row():
                found[variant] = measure(variant, samples, told.batch, told.rounds)
        else:
            found[variant] = measure(variant, samples, told.batch, told.rounds)
        one = found[variant]
        ratio = one.tokens_per_s / found["padded"].tokens_per_s
        print(
            f"{variant:9}{one.seconds:8.2f}{one.tokens_per_s:10,.0f}{ratio:7.2f}{one.padding:9.0%}"
            f"{one.states_mib:7.1f}{one.loss:11.6f}",
            flush=True,
        )
        assert abs(one.loss - found["padded"].loss) <= 1e-5 * abs(found["padded"].loss), "the losses differ"
    if told.json:
        figures = {name: asdict(one) for name, one in found.items()}
        told.json.write_text(json.dumps({"machine": machine, "lengths": lengths, "variants": figures}, indent=2))


if __name__ == "__main__":
    main()
