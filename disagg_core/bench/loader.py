"""What the loader costs beside the step: windows of large samples from a real store, and steps that only take time."""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

from disagg_core.bench.result import Figure, Result
from disagg_core.bench.scene import RUN, SMALL, Bench, bench_of, resized
from disagg_core.channel import StreamingRefChannel, StreamingRefQueue
from disagg_core.contracts import SampleRef, StreamTotals, sample_id_of
from disagg_core.run.phases import TRAINING_PHASES, shares_of
from disagg_core.run_spec.draft import DEFAULT_METHOD
from disagg_core.store import MooncakeFeatureStore, managed_store
from disagg_core.training.inputs import DraftInput
from disagg_core.training.loader import FeatureDataLoader
from disagg_core.training.phase_clock import PhaseClock
from disagg_core.training.staging import let_the_step_go_first

_MIB = 1 << 20
_WARM_UP = 3


def bench_loader(*, megabytes: int = 64, step_s: float = 0.1, steps: int = 30, method: str = DEFAULT_METHOD) -> Result:
    """Measure what windows of one sample of `megabytes` add to steps of `step_s`, fetched ahead from a full store."""
    bench = bench_of(method, resized(SMALL, hidden=1024, heads=8, dtype="bfloat16"))
    tokens = megabytes * _MIB // bench.capture.bytes_per_token(bench.shape.hidden, bench.shape.dtype)
    with (
        tempfile.TemporaryDirectory() as folder,
        managed_store((steps + _WARM_UP + 4) * megabytes * _MIB, log_dir=Path(folder) / "logs") as endpoints,
        MooncakeFeatureStore(endpoints, namespace=f"{RUN}/1", staging_bytes=4 * megabytes * _MIB) as store,
        StreamingRefChannel(Path(folder) / "channel", run_id=RUN) as writer,
        StreamingRefChannel(Path(folder) / "channel", run_id=RUN) as reader,
    ):
        publish(bench, store, writer, tokens, steps + _WARM_UP)
        total_s, clock = _trained(bench, store, reader, step_s)
    seconds: dict[str, float] = {}
    for lap in clock.finished():
        for phase, spent in lap.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    overhead = total_s / steps / step_s - 1
    shares = [
        Figure(f"share: {TRAINING_PHASES[phase]}", 100 * share, "%")
        for phase, share in shares_of(seconds).items()
        if share >= 0.0005 and phase != "forward"
    ]
    figures = [
        Figure("everything but the step", 100 * overhead, "%", 1 + overhead, "the step", "<= 3 %", overhead <= 0.03),
        *shares,
    ]
    return Result("loader", f"{megabytes} MiB a sample ({tokens} tokens), steps of {1e3 * step_s:.0f} ms", figures)


def publish(
    bench: Bench, store: MooncakeFeatureStore, channel: StreamingRefChannel, tokens: int, count: int
) -> list[SampleRef]:
    """Put and publish `count` samples of `tokens` tokens, and end the stream; return their references."""
    tensors, refs = bench.tensors(tokens), []
    for number in range(count):
        name = sample_id_of(number)
        refs.append(store.put(name, tensors, identity=bench.identity(), source_task_id=name, num_tokens=tokens))
    channel.publish_many(refs)
    size = sum(ref.size_bytes for ref in refs)
    channel.close(StreamTotals(refs=count, bytes=size, prompts=count, rejected=0))
    return refs


def _trained(
    bench: Bench, store: MooncakeFeatureStore, channel: StreamingRefChannel, step_s: float
) -> tuple[float, PhaseClock]:
    """Go through all windows with steps that wait; return the seconds after the warm-up, and their clock."""
    let_the_step_go_first()
    clock, step, began = PhaseClock(), threading.Event(), time.perf_counter()
    batcher = bench.method.batcher(bench.section, bench.to_train.model.config, seed=0)
    loader = FeatureDataLoader(
        StreamingRefQueue(channel),
        store,
        inputs=[DraftInput(batcher)],
        batch_size=1,
        channel=channel,
        prefetch_samples=4,
    )
    loader.on_phase = clock.enter
    for number, window in enumerate(loader):
        if number == _WARM_UP:
            clock.restart()
            began = time.perf_counter()
        clock.enter("forward")
        step.wait(step_s)
        clock.enter("ack")
        loader.complete(window, step=number + 1)
        if number >= _WARM_UP:
            clock.lap(number, samples=1)
    spent = time.perf_counter() - began
    loader.finish("end of stream")
    return spent, clock
