"""Whether capture and training overlap: each side alone, and both at once, in one run.

Training is real: a draft of any method, through channel, store and loader. Capture is synthetic and costs, per sample,
what training was measured to cost: either work of the processor, where each side has a core of its own, or time alone,
as on a GPU whose host has nothing to do meanwhile. With a real target, of random weights, both sides cost what they
cost, and share a GPU if there is but one. The pair can be as fast as the slower side; what it falls short of
that is what channel, store, flow control and bookkeeping take.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from disagg_core.bench.loader import publish
from disagg_core.bench.result import Figure, Result
from disagg_core.bench.scene import RUN, SMALL, Bench, Shape, bench_of, capture_of
from disagg_core.channel import StreamingRefChannel, StreamingRefQueue
from disagg_core.contracts import PromptTask, RunIdentity
from disagg_core.engines.contract import Captured, CaptureOutcome, Failed, Generated, ServerHealth, Target
from disagg_core.engines.transformers import TransformersTarget
from disagg_core.rollout.producer import build_disagg_online_producer
from disagg_core.run_spec.document import RolloutSection, TargetSection, TrainingSection
from disagg_core.run_spec.draft import DEFAULT_METHOD
from disagg_core.store import MooncakeFeatureStore, managed_store
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.training import build_disagg_online_consumer
from disagg_core.training.distributed import Ranks
from disagg_core.training.progress import TrainOutcome

Cost = Literal["processor", "time", "model"]
"""What a capture costs: work of the processor or time alone, as much as training; or a real target's prefill."""

_SPARE = 32 << 20


@dataclass(frozen=True)
class PipelineSetting:
    """What is measured: `samples` of `tokens` tokens in windows of `batch`, a draft of `method` for `shape`."""

    method: str = DEFAULT_METHOD
    shape: Shape = SMALL
    tokens: int = 128
    samples: int = 240
    batch: int = 8
    cost: Cost = "processor"
    watermark: int = 32
    batch_tokens: int = 8192
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def store_bytes(self) -> int:
        """Memory for all samples at once, and some more."""
        each = self.tokens * capture_of(self.method, self.shape).bytes_per_token(self.shape.hidden, self.shape.dtype)
        return int(1.2 * self.samples * each) + _SPARE


class SyntheticTarget:
    """A target whose capture takes `cost_s` a sample and gives the same states for every prompt."""

    batch_size = 1
    concurrency = 1

    def __init__(self, bench: Bench, store: MooncakeFeatureStore, tokens: int, cost_s: float, cost: Cost) -> None:
        self._store, self._cost_s, self._cost = store, cost_s, cost
        self._tensors = bench.tensors(tokens)
        self._shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}
        self._health = ServerHealth("synthetic")
        self._work = torch.randn(128, 128)

    def prepare(self, identity: RunIdentity) -> None:
        """There is nothing to load."""

    def capture(self, tasks: Sequence[PromptTask], *, avoid: Mapping[int, frozenset[str]]) -> Iterator[CaptureOutcome]:
        """Take the time of a capture for each task, and hand over its states."""
        for task in tasks:
            began = time.perf_counter()
            self._spend()
            places = self._store.allocate(self._shapes)
            for name, tensor in self._tensors.items():
                places[name].copy_(tensor)
            self._health.captured += 1
            tokens = len(self._tensors["input_ids"])
            yield Captured(task, places, tokens, capture_s=time.perf_counter() - began)

    def _spend(self) -> None:
        if self._cost == "time":
            threading.Event().wait(self._cost_s)
            return
        until = time.thread_time() + self._cost_s
        while time.thread_time() < until:
            self._work @ self._work

    def generate(
        self, tasks: Sequence[PromptTask], *, avoid: Mapping[int, frozenset[str]]
    ) -> Iterator[Generated | Failed]:
        """Nothing is generated."""
        yield from ()

    def health(self) -> list[ServerHealth]:
        """Return the one entry."""
        return [self._health]

    def close(self) -> None:
        """There is nothing to stop."""


def bench_pipeline(setting: PipelineSetting) -> Result:
    """Measure training alone, capture alone at the same cost a sample, and both at once."""
    with _Services(setting) as services:
        training = _training_alone(setting, _Place(services, "training"))
        each_s = 1.0 / training.samples_per_second
        capture = _capture_alone(setting, _Place(services, "capture"), each_s)
        pair = _together(setting, _Place(services, "pair"), each_s)
    slower = min(training.samples_per_second, capture)
    ratio = pair.samples_per_second / slower
    figures = [
        Figure("training alone", training.samples_per_second, "samples/s"),
        Figure("capture alone", capture, "samples/s", capture / training.samples_per_second, "training"),
        Figure(
            "both at once",
            pair.samples_per_second,
            "samples/s",
            ratio,
            "the slower side alone",
            ">= 0.95",
            ratio >= 0.95,
        ),
        Figure("training waits, both at once", 100 * pair.data_wait_s / pair.seconds, "%"),
    ]
    text = (
        f"{setting.method}, {setting.shape.name}, {setting.samples} samples of {setting.tokens} tokens in windows of "
        f"{setting.batch}; capture costs {setting.cost}, training on the {setting.device}"
    )
    return Result("pipeline", text, figures)


def _training_alone(setting: PipelineSetting, place: _Place) -> TrainOutcome:
    """Train on samples that are all in the store already."""
    bench = bench_of(setting.method, setting.shape, device=setting.device)
    with place.store() as store, place.channel() as writer:
        publish(bench, store, writer, setting.tokens, setting.samples)
        return _trained(setting, bench, store, place)


def _capture_alone(setting: PipelineSetting, place: _Place, each_s: float) -> float:
    """Return the samples a second of a producer whose samples are freed as they come."""
    with place.store() as store, place.channel() as reader:
        with _Producer(setting, place, each_s):
            queue, freed, began, last = StreamingRefQueue(reader), 0, 0.0, 0.0
            while refs := queue.get(setting.batch):
                began = began or time.perf_counter()
                store.release_many(refs)
                queue.ack(refs)
                freed, last = freed + len(refs), time.perf_counter()
            reader.finish("end of stream")
        return (freed - setting.batch) / (last - began)


def _together(setting: PipelineSetting, place: _Place, each_s: float) -> TrainOutcome:
    bench = bench_of(setting.method, setting.shape, device=setting.device)
    with place.store() as store, _Producer(setting, place, each_s):
        return _trained(setting, bench, store, place)


def _trained(setting: PipelineSetting, bench: Bench, store: MooncakeFeatureStore, place: _Place) -> TrainOutcome:
    section = TrainingSection(batch_size=setting.batch, device=setting.device)
    with Ranks.join(section.device) as ranks, place.channel() as channel:
        trainer, loader = build_disagg_online_consumer(
            channel=channel, store=store, drafts=[bench.to_train], parts=bench.parts, section=section, ranks=ranks
        )
        return trainer.fit(loader)


class _Services:
    """One store for all measurements, which leave it empty, and a folder for their channels."""

    def __init__(self, setting: PipelineSetting) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.directory = Path(self._folder.name)
        self._store = managed_store(setting.store_bytes, log_dir=self.directory / "logs")
        self.endpoints: StoreEndpoints

    def __enter__(self) -> _Services:
        self.endpoints = self._store.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._store.__exit__(*error)
        self._folder.cleanup()


class _Place:
    """Where one measurement puts its samples and references."""

    def __init__(self, services: _Services, name: str) -> None:
        self.endpoints = services.endpoints
        self.directory = services.directory / name

    def store(self) -> MooncakeFeatureStore:
        """Return a client of the store."""
        return MooncakeFeatureStore(self.endpoints, namespace=f"{RUN}/1")

    def channel(self) -> StreamingRefChannel:
        """Return one end of the channel."""
        return StreamingRefChannel(self.directory, run_id=RUN)


class _Producer:
    """A process that produces a setting's samples, while the context lasts."""

    def __init__(self, setting: PipelineSetting, place: _Place, each_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_produce, args=(setting, place.endpoints, place.directory, each_s))

    def __enter__(self) -> None:
        self._process.start()

    def __exit__(self, *error: Any) -> None:
        self._process.join(60.0)
        self._process.kill()
        self._process.join()


def _produce(setting: PipelineSetting, endpoints: StoreEndpoints, directory: Path, each_s: float) -> None:
    """Run the real producer over prompts of one length."""
    torch.set_num_threads(1)
    bench = bench_of(setting.method, setting.shape)
    tasks = [
        PromptTask(
            ordinal=number, source=f"bench:{number}", input_ids=[2] * setting.tokens, loss_mask=[1] * setting.tokens
        )
        for number in range(setting.samples)
    ]
    with (
        MooncakeFeatureStore(endpoints, namespace=f"{RUN}/1") as store,
        StreamingRefChannel(directory, run_id=RUN) as channel,
    ):
        _, drive = build_disagg_online_producer(
            prompts=tasks,
            target=_target_of(setting, bench, store, each_s),
            store=store,
            channel=channel,
            identity=bench.identity(),
            rollout=RolloutSection(high_watermark_refs=setting.watermark),
            window=setting.batch,
        )
        drive()


def _target_of(setting: PipelineSetting, bench: Bench, store: MooncakeFeatureStore, each_s: float) -> Target:
    if setting.cost != "model":
        return SyntheticTarget(bench, store, setting.tokens, each_s, setting.cost)
    facts = setting.shape.facts()
    target = TransformersTarget(
        TargetSection(model=facts.model, device=setting.device),
        facts,
        bench.capture,
        batch_tokens=setting.batch_tokens,
        model=setting.shape.model(setting.device),
        allocate=store.allocate,
    )
    target.prepare(bench.identity())
    return target
