"""What `draftline plan --simulate` prints: how fast each side would be, what holds the run up, and a better split."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.console import Group
from rich.table import Table
from rich.text import Text

from disagg_core.capacity.hardware import Hardware
from disagg_core.capacity.model import (
    Forecast,
    Split,
    best_split,
    bytes_in_flight,
    forecast,
    owners_needed,
    refs_needed,
)
from disagg_core.capacity.simulation import Scene, Simulated, Simulation
from disagg_core.capacity.work import SampleWork, work_of
from disagg_core.engines.transformers import group_for
from disagg_core.run.plan import RunPlan
from disagg_core.run.watermarks import Watermarks

_GIB = 1024**3
_WINDOWS = 80
_SAMPLES = 8000
_ANY_OWNERS = 10_000


@dataclass(frozen=True)
class Question:
    """What is asked: a forecast for `gpus` GPUs (None: as many as the document uses) and samples of `tokens` tokens."""

    hardware: Hardware
    gpus: int | None = None
    tokens: float | None = None
    owners: int = 1


def simulation_of(plan: RunPlan, question: Question) -> Group:
    """Return the forecast of the document's own split and of the best one, each beside its simulation.

    Raises:
        BadInput: there are too few GPUs for both sides.
    """
    work = work_of(plan, question.tokens)
    own = forecast(work, question.hardware, _own_split(plan, question.owners))
    gpus = question.gpus or own.split.gpus
    best, unbound = (
        best_split(
            work,
            question.hardware,
            gpus,
            gpus_per_server=plan.spec.target.tensor_parallel,
            owners=owners,
            shared_by=plan.spec.training.context_parallel,
        )
        for owners in (question.owners, _ANY_OWNERS)
    )
    columns = {"as the document says": own, f"best of {gpus} GPUs": best}
    table = Table("", *columns, title="What the pipeline would do", title_justify="left")
    cells = [_cells(plan, found, question.hardware) for found in columns.values()]
    for label in cells[0]:
        table.add_row(label, *(column[label] for column in cells))
    return Group(
        _assumed(work, question.hardware), Text(), table, Text(), _advice(own, best, unbound, question.hardware)
    )


def _own_split(plan: RunPlan, owners: int) -> Split:
    target = plan.spec.target
    servers = len(target.server_urls) or target.servers
    return Split(servers, target.tensor_parallel, plan.spec.world_size, owners, plan.spec.training.context_parallel)


def _assumed(work: SampleWork, hardware: Hardware) -> Text:
    return Text(
        f"Assumed: samples of {work.tokens:,.0f} tokens ({work.new_tokens:,.0f} generated), "
        f"{work.sample_bytes / 1e6:.1f} MB each; {hardware.gpu} with {hardware.tflops:,.0f} TFLOP/s, of which a "
        f"prefill reaches {hardware.capture_mfu:.0%}, a step {hardware.training_mfu:.0%}; "
        f"{hardware.network_gbs:g} GB/s a node, {hardware.owner_gbs:g} GB/s a store owner. "
        "The draft's attention and recomputation are left out."
    )


def _cells(plan: RunPlan, found: Forecast, hardware: Hardware) -> dict[str, str]:
    marks = _marks(plan, found)
    simulated = _simulated(plan, found, marks)
    cost = found.cost_per_million_tokens
    return {
        "split": found.split.describe(),
        **{f"{stage}, samples/s": f"{rate:,.1f}" for stage, rate in found.stages.items()},
        "bottleneck": found.bottleneck,
        "samples/s": f"{found.samples_per_s:,.1f}",
        "tokens/s": f"{found.samples_per_s * found.tokens:,.0f}",
        "they wait": ", ".join(f"{side} {share:.0%}" for side, share in found.idle.items()),
        "optimizer step": f"{found.step_s * 1e3:,.0f} ms, {found.reduce_s / found.step_s:.0%} of it over the network, "
        f"{found.global_batch} samples",
        "through the store": f"{found.bytes_per_s / 1e9:.2f} GB/s, {found.bytes_per_s * 3600 / 1e12:.1f} TB an hour",
        "store owners needed": str(owners_needed(found, hardware)),
        "high watermark needed": f"{refs_needed(found, _at_once(plan)):,} (rollout.high_watermark_refs)",
        "memory in flight": f"up to {bytes_in_flight(found, marks) / _GIB:.1f} GiB, {marks.high_refs} samples",
        "cost per million tokens": "" if cost is None else f"{cost:.3f}",
        "simulated, samples/s": f"{simulated.samples_per_s:,.1f} "
        f"({simulated.samples_per_s / found.samples_per_s:.2f} of the forecast)",
        "simulated waits": f"capture {simulated.space:.0%} for space, training {simulated.refs:.0%} for references, "
        f"{simulated.features:.0%} for features",
    }


def _marks(plan: RunPlan, found: Forecast) -> Watermarks:
    """Return the document's watermarks for its own split, and what another one needs."""
    window = found.global_batch
    if found.split.gpus == _own_split(plan, 1).gpus and window == plan.watermarks.window:
        return plan.watermarks
    return Watermarks(window=window, high_refs=max(plan.watermarks.high_refs, refs_needed(found, _at_once(plan))))


def _at_once(plan: RunPlan) -> int:
    """Return how many samples a server captures at a time; a target in the producer captures groups."""
    target = plan.spec.target
    return target.server_concurrency if target.backend == "sglang" else group_for(plan.spec.rollout.batch_tokens)


def _simulated(plan: RunPlan, found: Forecast, marks: Watermarks) -> Simulated:
    spec = plan.spec
    serving = spec.target.backend == "sglang"
    scene = Scene.of(
        found,
        marks,
        prefetch_samples=spec.training.prefetch_samples,
        ordered=spec.rollout.ordered,
        at_once=_at_once(plan) if serving else 1,
    )
    group = 1 if serving else _at_once(plan)
    return Simulation(replace(scene, group=group), samples=max(_SAMPLES, _WINDOWS * marks.window)).run()


def _advice(own: Forecast, best: Forecast, unbound: Forecast, hardware: Hardware) -> Text:
    """Say in one line what to change; `unbound` is the best split where the store never limits."""
    if unbound.samples_per_s > 1.03 * best.samples_per_s:
        return Text(
            f"the store is the bottleneck: with {owners_needed(unbound, hardware)} owners (store.mode: external, or "
            f"faster ones by store.protocol: rdma) {unbound.split.describe()} would do {unbound.samples_per_s:,.0f} "
            "samples/s"
        )
    gain = best.samples_per_s / own.samples_per_s
    if best.split.gpus == own.split.gpus and gain < 1.03:
        return Text(f"{own.bottleneck} is the slower side; no other split of {own.split.gpus} GPUs is better")
    return Text(f"{best.split.describe()} would do {gain:.2f} times the samples a second; {best.bottleneck} limits it")
