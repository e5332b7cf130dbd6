"""Measuring held-out samples on a GPU keeps to the memory of a training step."""

from __future__ import annotations

import pytest
import torch

from disagg_core.bench.scene import TINY, bench_of, resized
from disagg_core.run_spec.document import TrainingSection
from disagg_core.training.consumer import optimizer_step_of
from disagg_core.training.distributed import Ranks
from disagg_core.training.inputs import DraftInput
from disagg_core.training.phase_clock import PhaseClock

pytestmark = [
    pytest.mark.unit,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS, ANCHORS = 4096, 512


def test_the_scores_of_all_slots_are_never_there_at_once() -> None:
    shape = resized(TINY, head_dim=64, dtype="bfloat16")
    with Ranks.join("cuda") as ranks:
        bench = bench_of("dflash", shape, {"anchors": ANCHORS}, device="cuda")
        batcher = bench.method.batcher(bench.section, bench.to_train.model.config, seed=0)
        section = TrainingSection(device="cuda", precision="bfloat16")
        step = optimizer_step_of(bench.to_train, bench.parts, ranks, section, batcher, None, PhaseClock(ranks.device))
        reads = DraftInput(batcher)
        window = reads.begin()
        reads.add(window, [bench.sample(TOKENS, number) for number in range(2)])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()

        figures = step.measure(window)

    slots = 2 * ANCHORS * bench.to_train.model.config.block_size
    all_scores = 4 * shape.heads * slots * (2 * TOKENS + slots)
    assert figures["loss"]
    assert torch.cuda.max_memory_allocated() - before < all_scores / 4
