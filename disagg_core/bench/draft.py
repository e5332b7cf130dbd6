"""One optimizer step of a draft, as training takes it: time, tokens, memory, phases, and the part of the peak reached.

The peak is that of this machine, measured in the same run with one large matrix product in the step's precision. The
operations are counted as they are executed, recomputation among them; a kernel that torch cannot look into counts for
nothing, so that the part of the peak is a lower bound there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from disagg_core.bench.result import Figure, Result
from disagg_core.bench.scene import Bench, Shape, bench_of
from disagg_core.run.phases import TRAINING_PHASES, shares_of
from disagg_core.run_spec.document import TrainingSection
from disagg_core.training.consumer import optimizer_step_of
from disagg_core.training.distributed import Ranks, compute_dtype
from disagg_core.training.inputs import DraftBatches, DraftInput
from disagg_core.training.phase_clock import PhaseClock
from disagg_core.training.step import OptimizerStep

_WARM_UP = 2
_PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm"}
_WINDOW_BYTES = 8 * 1024**3
_PRODUCT = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class StepFigures:
    """What was measured of one kind of step: seconds, operations, bytes, the share of each phase."""

    seconds: float
    flops: float
    peak_flops: float
    peak_bytes: int
    tokens: int
    shares: dict[str, float]

    @property
    def utilisation(self) -> float:
        """The part of the measured peak that the step reaches."""
        return self.flops / self.seconds / self.peak_flops


def bench_draft(
    method: str,
    shape: Shape,
    *,
    tokens: int = 512,
    batch: int = 2,
    steps: int = 10,
    device: str = "cpu",
    options: dict[str, Any] | None = None,
    section: TrainingSection | None = None,
) -> Result:
    """Measure steps of `method` on `batch` samples of `tokens` tokens."""
    found = step_figures(
        method, shape, tokens=tokens, batch=batch, steps=steps, device=device, options=options, section=section
    )
    setting = f"{method}, {shape.name}, batch {batch} x {tokens}, {device}"
    return Result("draft", setting, list(_figures(found)))


def _figures(found: StepFigures) -> list[Figure]:
    phases = [
        Figure(f"share: {label}", 100 * found.shares[phase], "%")
        for phase, label in TRAINING_PHASES.items()
        if found.shares.get(phase, 0.0) >= 0.0005
    ]
    memory = [Figure("peak memory", found.peak_bytes / 2**30, "GiB")] if found.peak_bytes else []
    return [
        Figure("optimizer step", 1e3 * found.seconds, "ms"),
        Figure("tokens", found.tokens / found.seconds, "tokens/s"),
        Figure(
            "executed operations", found.flops / found.seconds / 1e9, "GFLOP/s", found.utilisation, "a matrix product"
        ),
        *memory,
        *phases,
    ]


def step_figures(
    method: str,
    shape: Shape,
    *,
    tokens: int,
    batch: int,
    steps: int,
    device: str,
    options: dict[str, Any] | None = None,
    section: TrainingSection | None = None,
) -> StepFigures:
    """Return what `steps` optimizer steps took, after a warm-up; one more step counts the operations."""
    training = section or TrainingSection(batch_size=batch, device="cuda" if device == "cuda" else "cpu")
    with Ranks.join(training.device) as ranks:
        bench = bench_of(method, shape, options, device=str(ranks.device))
        clock = PhaseClock(ranks.device)
        batcher = bench.method.batcher(bench.section, bench.to_train.model.config, seed=0)
        step = optimizer_step_of(bench.to_train, bench.parts, ranks, training, batcher, None, clock)
        window = _window(bench, batcher, tokens, batch, ranks.device)
        run = _Runner(step, window, batch, batch * tokens)
        for _ in range(_WARM_UP):
            run()
        _forget_peak(ranks.device)
        clock.restart()
        seconds = _timed(run, steps, ranks.device)
        clock.lap(steps, samples=batch * steps)
        _settle(ranks.device)
        laps = list(clock.finished())
        peak = _peak_memory(ranks.device)
        return StepFigures(
            seconds=seconds / steps,
            flops=_flops(run, ranks.device),
            peak_flops=_peak_flops(ranks.device, compute_dtype(training.precision, ranks.device)),
            peak_bytes=peak,
            tokens=batch * tokens,
            shares=shares_of(laps[0].seconds) if laps else {},
        )


class _Runner:
    """Takes one step of a window again and again."""

    def __init__(self, step: OptimizerStep, window: DraftBatches, samples: int, tokens: int) -> None:
        self._step, self._window, self._samples, self._tokens = step, window, samples, tokens
        self._number = 0

    def __call__(self) -> None:
        self._step.run(self._window, self._number, samples=self._samples, tokens=self._tokens)
        self._number += 1


def _window(bench: Bench, batcher: Any, tokens: int, batch: int, device: torch.device) -> DraftBatches:
    """Return a window of one micro-batch, which is on the device already."""
    reads, on_gpu = DraftInput(batcher), device.type == "cuda"
    window = reads.begin()
    reads.add(window, [bench.sample(tokens, number) for number in range(batch)], pin=on_gpu)
    if on_gpu:
        window.copy_to(device, most=_WINDOW_BYTES)
    return window


def _flops(run: _Runner, device: torch.device) -> float:
    """Return the operations of the products that one step executes."""
    if device.type == "cpu":
        with FlopCounterMode(display=False, custom_mapping=_onednn_products()) as counter:
            run()
        return float(counter.get_total_flops())
    # Under a dispatch mode, as the counter is, compiled attention would run eagerly, with all scores in memory.
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as trace:
        run()
    return float(sum(event.flops for event in trace.key_averages() if event.key in _PRODUCTS))


def _onednn_products() -> dict[Any, Any]:
    """Return how to count the products that drafts send to oneDNN, which torch's counter does not know."""

    def operations(rows: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(rows) * weight[0]  # [m, k] and [n, k]

    product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return {} if product is None else {product: operations}


def _timed(run: _Runner, steps: int, device: torch.device) -> float:
    _settle(device)
    began = time.perf_counter()
    for _ in range(steps):
        run()
    _settle(device)
    return time.perf_counter() - began


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> int:
    """Return the most bytes that tensors took; 0 on the CPU, where nobody counts them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations a second of one large matrix product: the best of some."""
    size = _PRODUCT[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        _settle(device)
        began = time.perf_counter()
        left @ right
        _settle(device)
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best
