"""Training a draft on one GPU, shapes of Qwen3-8B, bf16: step time, tokens/s, MFU, memory, phases, hidden copies.

    python -m tests.benchmarks.gpu.step [--draft eagle3|dflash2|all] [--batch 4] [--tokens 2048] [--compile]

First the optimizer step alone, on one batch. Then the whole consumer on a stream that is in the store already: its rate
beside the bare step's, the share of each phase, and the part of the copies to the GPU that the step hides (1 is all).
MFU is by the method's formula over the card's peak; the executed operations, recomputation among them, are beside it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from disagg_core.bench.draft import StepFigures, step_figures
from disagg_core.bench.loader import publish
from disagg_core.bench.result import Figure, Result
from disagg_core.bench.scene import RUN, Bench, bench_of
from disagg_core.channel import StreamingRefChannel
from disagg_core.run.metrics import read_metrics
from disagg_core.run.phases import TRAINING_PHASES, seconds_of, shares_of
from disagg_core.store import MooncakeFeatureStore, managed_store
from disagg_core.training import build_disagg_online_consumer
from disagg_core.training.distributed import Ranks
from disagg_core.training.observers import LapObserver
from tests.benchmarks.gpu.common import Scale, arguments, drafts_of, model_flops, scale_of, show


def measure(method: str, scale: Scale) -> Result:
    bare = step_figures(
        method, scale.shape, tokens=scale.tokens, batch=scale.batch, steps=scale.steps, device=scale.device,
        section=scale.section,
    )  # fmt: skip
    setting = f"{method}, {scale.shape.name}, batch {scale.batch} x {scale.tokens}, {scale.device}"
    setting += ", compiled" if scale.compile else ""
    return Result("step", setting, [*bare_figures(method, scale, bare), *consumer_figures(method, scale, bare)])


def bare_figures(method: str, scale: Scale, bare: StepFigures) -> list[Figure]:
    bench = bench_of(method, scale.shape, device=scale.device)
    config = bench.to_train.model.config
    flops = model_flops(method, bench.section, config, scale.shape, tokens=scale.tokens, batch=scale.batch)
    peak = scale.peak_tflops * 1e12
    mfu = flops / bare.seconds / peak
    return [
        Figure("optimizer step", 1e3 * bare.seconds, "ms"),
        Figure("tokens", bare.tokens / bare.seconds, "tokens/s"),
        Figure("MFU", 100 * mfu, "%", mfu, "the card's peak", ">= 45 %, aim 50 %", mfu >= 0.45),
        Figure("executed operations", bare.flops / 1e12, "TFLOP", bare.flops / flops, "the formula's"),
        Figure("executed, a second", bare.flops / bare.seconds / 1e12, "TFLOP/s", bare.utilisation, "a matrix product"),
        Figure("peak memory", bare.peak_bytes / 2**30, "GiB"),
    ]


def consumer_figures(method: str, scale: Scale, bare: StepFigures) -> list[Figure]:
    windows = scale.steps + 2
    bench = bench_of(method, scale.shape, device=scale.device)
    with tempfile.TemporaryDirectory() as folder:
        phases, rate = trained(bench, scale, windows, Path(folder))
    shares = shares_of(phases)
    return [
        Figure("whole consumer", rate, "samples/s", rate * bare.seconds / scale.batch, "the bare step", ">= 0.97"),
        *(copies(bench, scale, phases["h2d"] / (windows - 1)) if scale.device == "cuda" else ()),
        *(Figure(f"share: {label}", 100 * shares.get(phase, 0.0), "%") for phase, label in TRAINING_PHASES.items()),
    ]


def copies(bench: Bench, scale: Scale, in_step_s: float) -> list[Figure]:
    """What a window's copy takes alone, and which part of it a step does not wait for."""
    copy_s = copy_alone(bench, scale)
    hidden = 1 - in_step_s / copy_s
    return [
        Figure("copy of a window to the device, alone", 1e3 * copy_s, "ms"),
        Figure("copies that the step hides", 100 * hidden, "%", hidden, "the copy alone"),
    ]


def trained(bench: Bench, scale: Scale, windows: int, folder: Path) -> tuple[dict[str, float], float]:
    """Seconds of each phase of all windows but the first, and samples a second."""
    size = scale.tokens * bench.capture.bytes_per_token(scale.shape.hidden, scale.shape.dtype)
    count = windows * scale.batch
    with (
        managed_store(max(256 << 20, int(1.2 * (count + 4) * size)), log_dir=folder / "logs") as endpoints,
        MooncakeFeatureStore(endpoints, namespace=f"{RUN}/1", staging_bytes=max(64 << 20, 4 * size)) as store,
        StreamingRefChannel(folder / "channel", run_id=RUN) as writer,
        StreamingRefChannel(folder / "channel", run_id=RUN) as reader,
        Ranks.join(scale.section.device) as ranks,
    ):
        publish(bench, store, writer, scale.tokens, count)
        trainer, loader = build_disagg_online_consumer(
            channel=reader, store=store, drafts=[bench.to_train], parts=bench.parts, section=scale.section, ranks=ranks,
            observer=LapObserver(folder / "phases.jsonl"),
        )  # fmt: skip
        trainer.fit(loader)
    laps = [seconds_of(record, TRAINING_PHASES) for record in read_metrics(folder / "phases.jsonl")][1:]
    sums = {phase: sum(lap[phase] for lap in laps) for phase in TRAINING_PHASES}
    return {str(phase): value for phase, value in sums.items()}, len(laps) * scale.batch / sum(sums.values())


def copy_alone(bench: Bench, scale: Scale) -> float:
    """Seconds of one window's copy to the device with nothing beside it; the best of some."""
    batcher = bench.method.batcher(bench.section, bench.to_train.model.config, seed=0)
    batch = batcher.collate([bench.sample(scale.tokens, number) for number in range(scale.batch)], pin=True)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        batch.to(torch.device(scale.device))
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def main() -> None:
    options = arguments(__doc__).parse_args()
    scale = scale_of(options)
    show([measure(method, scale) for method in drafts_of(options)], options.json)


if __name__ == "__main__":
    main()
