"""What a save costs training: steps with a save in every interval against steps without, in turns.

    OMP_NUM_THREADS=1 PYTHONPATH=. python tests/benchmarks/bench_checkpoints.py [--hidden 512] [--interval 60]
        [--rounds 5] [--json FILE]

An interval is so many optimizer steps of an EAGLE-3 draft on random samples. Three kinds of it take turns: without a
save, with one in the background (as the trainer does), with one that is waited for. `lost` is what an interval takes
beyond one without a save; `held up` what the calls that start a save and take its end took themselves.
Bound: lost in the background is at most 3 % of the interval.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from disagg_core.contracts import sample_id_of
from disagg_core.drafts.eagle3 import Eagle3Config, Eagle3Draft
from disagg_core.drafts.eagle3.options import Eagle3Section
from disagg_core.drafts.method import FrozenParts, Sample
from disagg_core.drafts.registry import method_of
from disagg_core.drafts.vocab import VocabMap
from disagg_core.run_spec.document import TrainingSection
from disagg_core.training.checkpoint import DraftProgress
from disagg_core.training.checkpointing import Checkpointing
from disagg_core.training.distributed import Ranks, shard
from disagg_core.training.inputs import DraftInput
from disagg_core.training.optimizer import Schedule
from disagg_core.training.progress import CheckpointPolicy, TrainingProgress
from disagg_core.training.randomness import RandomState
from disagg_core.training.step import OptimizerStep
from disagg_core.training.trainee import Trainee

VOCAB, TOKENS, BATCH = 4096, 256, 2
BOUND = 0.03


def trainee_of(hidden: int, ranks: Ranks) -> tuple[Trainee, DraftInput]:
    """Return a draft of width `hidden` with its optimizer step, and how it reads samples."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": 8, "vocab_size": VOCAB}
    draft = Eagle3Draft(Eagle3Config.from_dict(sizes))
    draft.set_vocab_map(VocabMap.identity(VOCAB))
    parts = FrozenParts(torch.randn(VOCAB, hidden), torch.randn(VOCAB, hidden))
    draft.set_embedding(parts.embedding)
    method, options, section = method_of("eagle3"), Eagle3Section(ttt_length=3), TrainingSection(device="cpu")
    batcher = method.batcher(options, draft.config, seed=0)
    module = method.loss(draft, parts, options, activation_checkpointing=False).to(ranks.device)
    step = OptimizerStep(
        module,
        shard(module, ranks, torch.float32),
        draft,
        method=method,
        batcher=batcher,
        ranks=ranks,
        section=section,
        schedule=Schedule(1e-4, 0.0, None),
    )
    return Trainee("", draft, step, RandomState(0, ranks.device), DraftProgress()), DraftInput(batcher)


def samples_of(hidden: int) -> list[Sample]:
    """Return one micro-batch of random samples, the second half of each trained on."""
    generator = torch.Generator().manual_seed(1)
    return [
        Sample(
            sample_id_of(number),
            {
                "input_ids": torch.randint(0, VOCAB, (TOKENS,), generator=generator, dtype=torch.int32),
                "loss_mask": (torch.arange(TOKENS) >= TOKENS // 2).to(torch.uint8),
                "aux_hidden_states": torch.randn(TOKENS, 3 * hidden, generator=generator),
                "last_hidden_state": torch.randn(TOKENS, hidden, generator=generator),
            },
        )
        for number in range(BATCH)
    ]


class Intervals:
    """Trains interval after interval, and says what each took."""

    def __init__(self, hidden: int, steps: int, root: Path, ranks: Ranks) -> None:
        self._trainee, reads = trainee_of(hidden, ranks)
        self._window = reads.begin()
        reads.add(self._window, samples_of(hidden))
        self._steps = steps
        self.progress = TrainingProgress(drafts={"": self._trainee.progress})
        policy = CheckpointPolicy(root, steps, 1, 0, {}, None)
        self._checkpoints = Checkpointing(policy, [self._trainee], self.progress, ranks=ranks, on_saving=lambda: None)
        self.held_up_s = 0.0

    @property
    def bytes(self) -> int:
        """Size of a checkpoint's tensors."""
        content = self._trainee.content()
        return sum(t.nbytes for group in (content.weights, content.optimizer) for t in group.values())

    def run(self, kind: str) -> float:
        """Return the seconds of an interval: `plain`, saved in the `background`, or `waited` for."""
        began = time.perf_counter()
        for _ in range(self._steps):
            self._trainee.train(self._window, samples=BATCH, tokens=BATCH * TOKENS)
            self.progress.step += 1
            self._timed(self._checkpoints.look)
        if kind != "plain":
            self._timed(self._checkpoints.start)
        if kind == "waited":
            self._timed(self._checkpoints.finish)
        return time.perf_counter() - began

    def settle(self) -> None:
        """Wait for a save that is under way, outside of any interval."""
        self._checkpoints.finish()

    def close(self) -> None:
        """End the thread that saves."""
        self._checkpoints.close()

    def _timed(self, call: Callable[[], None]) -> None:
        began = time.perf_counter()
        call()
        self.held_up_s += time.perf_counter() - began


def measured(hidden: int, steps: int, rounds: int) -> dict[str, object]:
    """Return the figures."""
    seconds: dict[str, list[float]] = {"plain": [], "background": [], "waited": []}
    held_up: dict[str, list[float]] = {kind: [] for kind in seconds}
    with Ranks.join("cpu") as ranks, tempfile.TemporaryDirectory() as root:
        intervals = Intervals(hidden, steps, Path(root), ranks)
        intervals.run("waited")
        for _ in range(rounds):
            for kind in seconds:
                intervals.held_up_s = 0.0
                if kind == "background":  # the save of one interval is written in the next
                    intervals.run(kind)
                    intervals.held_up_s = 0.0
                seconds[kind].append(intervals.run(kind))
                held_up[kind].append(intervals.held_up_s)
                intervals.settle()
        size = intervals.bytes
        intervals.close()
    plain = statistics.median(seconds["plain"])
    lost = {kind: statistics.median(seconds[kind]) / plain - 1 for kind in ("background", "waited")}
    stalled = {kind: statistics.median(held_up[kind]) / plain for kind in ("background", "waited")}
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "checkpoint_bytes": size,
        "interval_s": plain,
        "spread_of_plain": (max(seconds["plain"]) - min(seconds["plain"])) / plain,
        "lost": lost,
        "held_up": stalled,
        "bound": BOUND,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--interval", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    found = measured(told.hidden, told.interval, told.rounds)
    print(json.dumps(found, indent=2))
    if told.json is not None:
        told.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
