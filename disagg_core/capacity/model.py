"""How fast each stage of the pipeline is on given machines, which one is the slowest, and the best split of GPUs.

Every stage has a rate in samples a second; the pipeline has the rate of the slowest. That is what watermarks with room
for some windows come to: `disagg_core.capacity.simulation` checks it against the real flow control.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from disagg_core.capacity.hardware import Hardware
from disagg_core.capacity.work import SampleWork
from disagg_core.errors import BadInput
from disagg_core.run.watermarks import Watermarks

REFS_PER_S = 100_000.0
"""References that one channel passes on in a second, written, read and acknowledged in windows (`draftline bench`)."""

_GATHERED, _REDUCED = 2, 4
"""Bytes of a parameter that FSDP gathers in bf16, twice a step, and reduces in fp32, once."""


@dataclass(frozen=True)
class Split:
    """How GPUs are divided: `servers` of `gpus_per_server` capture, `ranks` train; `owners` hold the samples.

    `shared_by` ranks share the positions of each sample, and each of them fetches all of it.
    """

    servers: int
    gpus_per_server: int
    ranks: int
    owners: int = 1
    shared_by: int = 1

    @property
    def gpus(self) -> int:
        """GPUs of both sides."""
        return self.servers * self.gpus_per_server + self.ranks

    @property
    def groups(self) -> int:
        """Groups of ranks that have samples of their own."""
        return self.ranks // self.shared_by

    def describe(self) -> str:
        """Return it in words."""
        each = f" of {self.gpus_per_server} GPUs" if self.gpus_per_server > 1 else ""
        shared = f" in groups of {self.shared_by}" if self.shared_by > 1 else ""
        return f"{self.servers} capture{each} + {self.ranks} train{shared}"


@dataclass(frozen=True)
class Forecast:
    """What the pipeline would do with one split; rates are samples a second, `stages` by what they are called.

    `step_s` is one optimizer step of `global_batch` samples, of which `reduce_s` are spent on gradients and weights.
    """

    split: Split
    stages: dict[str, float]
    step_s: float
    reduce_s: float
    global_batch: int
    tokens: float
    sample_bytes: float
    price: float | None

    @property
    def bottleneck(self) -> str:
        """The slowest stage."""
        return min(self.stages, key=lambda stage: self.stages[stage])

    @property
    def samples_per_s(self) -> float:
        """The rate of the pipeline."""
        return self.stages[self.bottleneck]

    @property
    def bytes_per_s(self) -> float:
        """What goes out of the store."""
        return self.samples_per_s * self.sample_bytes * self.split.shared_by

    @property
    def idle(self) -> dict[str, float]:
        """The share of its time that each side would wait for the other one."""
        return {side: 1.0 - self.samples_per_s / self.stages[side] for side in ("capture", "training")}

    @property
    def cost_per_million_tokens(self) -> float | None:
        """The price of a million trained tokens, in the price's currency; None without a price."""
        if self.price is None:
            return None
        return self.price * self.split.gpus / 3600.0 / (self.samples_per_s * self.tokens) * 1e6


def forecast(work: SampleWork, hardware: Hardware, split: Split) -> Forecast:
    """Return how fast each stage is with `split`."""
    capture_s = _capture_s(work, hardware, split.gpus_per_server)
    compute_s = work.training_flops / (hardware.tflops * 1e12 * hardware.training_mfu)
    reduce_s = _reduce_s(work, hardware, split.ranks)
    step_s = work.batch * compute_s / split.shared_by + reduce_s
    window = split.groups * work.batch
    network = hardware.network_gbs * 1e9 / work.sample_bytes  # samples a second through one node
    owner = min(hardware.owner_gbs, hardware.network_gbs) * 1e9 / work.sample_bytes
    return Forecast(
        split=split,
        stages={
            "capture": split.servers / capture_s,
            "put": _nodes(split.servers * split.gpus_per_server, hardware) * network,
            "store": split.owners * owner / split.shared_by,
            "get": _nodes(split.ranks, hardware) * network / split.shared_by,
            "channel": REFS_PER_S,
            "training": window / step_s,
        },
        step_s=step_s,
        reduce_s=reduce_s,
        global_batch=window,
        tokens=work.tokens,
        sample_bytes=work.sample_bytes,
        price=hardware.price,
    )


def best_split(
    work: SampleWork, hardware: Hardware, gpus: int, *, gpus_per_server: int = 1, owners: int = 1, shared_by: int = 1
) -> Forecast:
    """Return the forecast of the split of `gpus` that trains the most samples; of equals the one that trains wider.

    Of those the one with the fewest servers: what makes up no group of `shared_by` ranks and captures more than is
    trained stays unused.

    Raises:
        BadInput: there are too few GPUs for a server and a group of ranks.
    """
    found = list(_splits(work, hardware, gpus, gpus_per_server, owners, shared_by))
    if not found:
        trainers = "one trainer" if shared_by == 1 else f"{shared_by} trainers (training.context_parallel)"
        raise BadInput(
            f"--gpus: expected at least {gpus_per_server + shared_by}, one server of {gpus_per_server} "
            f"(target.tensor_parallel) and {trainers}, found {gpus}"
        )
    return max(found, key=lambda forecast: (forecast.samples_per_s, forecast.split.ranks))


def _splits(
    work: SampleWork, hardware: Hardware, gpus: int, each: int, owners: int, shared_by: int
) -> Iterator[Forecast]:
    for servers in range(1, (gpus - shared_by) // each + 1):
        ranks = (gpus - servers * each) // shared_by * shared_by
        yield forecast(work, hardware, Split(servers, each, ranks, owners, shared_by))


def owners_needed(forecast: Forecast, hardware: Hardware) -> int:
    """Return how many store owners the pipeline needs so that the store is not what holds it up."""
    others = min(rate for stage, rate in forecast.stages.items() if stage != "store")
    each = min(hardware.owner_gbs, hardware.network_gbs) * 1e9 / (forecast.sample_bytes * forecast.split.shared_by)
    return max(1, math.ceil(others / each))


def refs_needed(forecast: Forecast, at_once: int) -> int:
    """Return the high watermark that does not hold the pipeline up, where every server captures `at_once` at a time.

    By Little's law, what is under way is the rate times the time that a sample is: in its capture, and while the
    windows before its own are trained. Two windows more let both sides go on while the other one is late.
    """
    captured_s = at_once * forecast.split.servers / forecast.stages["capture"]
    under_way = forecast.samples_per_s * (captured_s + forecast.step_s)
    return math.ceil(under_way) + 2 * forecast.global_batch


def bytes_in_flight(forecast: Forecast, marks: Watermarks) -> float:
    """Return the most bytes that samples of the mean length take in the store under these watermarks."""
    by_count = marks.high_refs * forecast.sample_bytes
    return by_count if marks.high_bytes is None else min(by_count, float(marks.high_bytes))


def _capture_s(work: SampleWork, hardware: Hardware, gpus: int) -> float:
    """Return the seconds of a server for one sample: its prefill, and its share of the decoding of a batch."""
    prefill_s = work.prefill_flops / (gpus * hardware.tflops * 1e12 * hardware.capture_mfu)
    decode_step_s = work.weight_bytes / (gpus * hardware.memory_gbs * 1e9 * hardware.decode_efficiency)
    return prefill_s + work.new_tokens * decode_step_s / work.decoded_together


def _reduce_s(work: SampleWork, hardware: Hardware, ranks: int) -> float:
    """Return what gathering weights and reducing gradients adds to a step: all of it passes a ring's slowest link."""
    inside = ranks <= hardware.gpus_per_node
    link = hardware.link_gbs if inside else min(hardware.link_gbs, hardware.network_gbs)
    return work.trained * (2 * _GATHERED + _REDUCED) * (ranks - 1) / ranks / (link * 1e9)


def _nodes(gpus: int, hardware: Hardware) -> int:
    return math.ceil(gpus / hardware.gpus_per_node)
