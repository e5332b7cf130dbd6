"""The plan of a run as a person reads it: processes, pools, GPUs, bytes per sample, memory of the store."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from disagg_core.cli.plan_memory import memory_of
from disagg_core.contracts import Capture
from disagg_core.drafts.cost import DraftCost, cost_of
from disagg_core.drafts.warm_start import first_config
from disagg_core.run.plan import PlannedDraft, RunPlan
from disagg_core.run_spec.document import RunSpec
from disagg_core.store.capacity import most_regions

_GIB = 1024**3
_MIB = 1024**2


def render(plan: RunPlan) -> Group:
    """Return what `draftline plan` prints. All of it was checked against each other by `make_plan`."""
    head = Text(f"{plan.spec.run.name}: {plan.spec.drafts_title} for {plan.target.describe()}")
    costs = [part for draft in plan.drafts for part in (Text(), _draft(plan, draft))]
    return Group(head, Text(), _processes(plan), *costs, Text(), _numbers(plan), Text(), _memory(plan))


def _processes(plan: RunPlan) -> Table:
    spec = plan.spec
    pools = spec.orchestration.pools
    table = Table("process", "pool", "count", "GPUs each", title="What would run", title_justify="left")
    table.add_row("parent flow: attempts, completion, archive", pools.orchestrator, "1", "0")
    if spec.store.mode == "managed":
        table.add_row("mooncake_master", f"{pools.orchestrator} (parent)", "1", "0")
        table.add_row(
            f"store owner, {_size(plan.store_capacity)} of memory", f"{pools.orchestrator} (parent)", "1", "0"
        )
    else:
        table.add_row(f"Mooncake at {spec.store.master_address}", "external", "-", "-")
    table.add_row(f"rollout producer, {spec.rollout.workers} workers", pools.rollout, "1", _producer_gpus(plan))
    if spec.target.backend == "sglang":
        if spec.target.server_urls:
            table.add_row("SGLang servers: " + ", ".join(spec.target.server_urls), "external", "-", "-")
        else:
            gpus = "0" if spec.target.device == "cpu" else str(spec.target.tensor_parallel)
            table.add_row("SGLang server", f"{pools.rollout} (producer)", str(spec.target.servers), gpus)
    training = spec.training
    each = "0" if training.device == "cpu" else "1"
    shared = f", {training.context_parallel} share each sample" if training.context_parallel > 1 else ""
    ranks = f"training ranks: {training.nodes} node(s) of {training.processes}{shared}"
    table.add_row(ranks, pools.train, str(spec.world_size), each)
    if spec.evaluation.measured:
        each = "0" if spec.target.device == "cpu" else "1"
        table.add_row("evaluation, after the two roles", pools.rollout, "1", each)
    table.add_row("GPUs of the producer", pools.rollout, *_listed(spec.orchestration.devices.rollout))
    table.add_row("GPUs of the consumer, on each node", pools.train, *_listed(spec.orchestration.devices.train))
    return table


def _listed(devices: Sequence[int] | None) -> tuple[str, str]:
    if devices is None:
        return "", "as the worker sees them"
    return str(len(devices)), ", ".join(map(str, devices))


def _producer_gpus(plan: RunPlan) -> str:
    target = plan.spec.target
    return "0" if target.backend == "sglang" or target.device == "cpu" else "1 (or device_map)"


def _draft(plan: RunPlan, draft: PlannedDraft) -> Table:
    """Return what a draft costs. Activations, which depend on kernels, are not in it."""
    table = Table(show_header=False, title=f"What the draft {draft.name} costs", title_justify="left")
    table.add_column(style="dim")
    table.add_column()
    table.add_row("draft vocabulary", f"{draft.vocabulary.size} of {draft.target.vocab_size}")
    for label, value in _cost_lines(_cost(plan, draft), plan.spec):
        table.add_row(label, value)
    return table


def _cost_lines(cost: DraftCost, spec: RunSpec) -> list[tuple[str, str]]:
    """Return what is said of one draft, with its labels."""
    step = spec.global_batch_size * cost.logit_rows
    return [
        ("draft parameters", f"{cost.parameters:,}"),
        ("bytes per token that it reads", str(cost.bytes_per_token)),
        ("rows of logits per step", f"up to {step:,}, {cost.logit_rows:,} of each sample, {cost.logit_width:,} wide"),
        ("logits of a sample, made in slices", f"up to {_size(cost.logits_bytes)} if they were held at once"),
        *_trained_lines(cost, spec.world_size),
        ("a checkpoint on the disk", f"{_size(cost.trained.checkpoint)}, {_size(cost.trained.masters)} untrained"),
        ("embedding and LM head of the target", f"{_size(cost.frozen_bytes)} on each rank"),
        (
            "memory of a rank, without activations",
            _size(cost.rank_bytes(spec.world_size, spec.training.batch_size, spec.training.context_parallel)),
        ),
    ]


def _trained_lines(cost: DraftCost, ranks: int) -> list[tuple[str, str]]:
    trained = cost.trained
    if not cost.offloaded:
        return [("weights, gradients, optimizer", f"{_size(trained.total)} over {ranks} ranks")]
    return [
        ("weights, gradients", f"{_size(trained.weights)} over {ranks} ranks"),
        ("optimizer, in host memory", f"{_size(trained.optimizer)} over {ranks} ranks"),
    ]


def _cost(plan: RunPlan, draft: PlannedDraft) -> DraftCost:
    section, target = draft.section, draft.target
    return cost_of(
        draft.method,
        section,
        first_config(draft.init_path, section, target, draft.capture, draft.vocabulary.size),
        target,
        draft.capture,
        max_tokens=plan.spec.data.max_tokens,
        compute_dtype="float32" if plan.spec.training.device == "cpu" else target.dtype,
        training=plan.spec.training,
    )


def _numbers(plan: RunPlan) -> Table:
    spec = plan.spec
    training = spec.training
    table = Table(show_header=False, title="What it needs, checked against each other", title_justify="left")
    table.add_column(style="dim")
    table.add_column()
    table.add_row("captured layers (0-based outputs)", _captured(plan.capture))
    table.add_row("prompts", "not known before the run" if plan.total_prompts is None else str(plan.total_prompts))
    table.add_row(
        "optimizer steps", "as many as the prompts give" if plan.total_steps is None else str(plan.total_steps)
    )
    table.add_row("bytes per token", f"{plan.bytes_per_token}")
    table.add_row("bytes per sample", f"up to {_size(plan.max_sample_bytes)} ({spec.data.max_tokens} tokens)")
    table.add_row(
        "global batch",
        f"{spec.global_batch_size} samples = {_parts(spec)} x {training.batch_size} x "
        f"{training.accumulation_steps}, up to {_size(spec.global_batch_size * plan.max_sample_bytes)}",
    )
    marks = plan.watermarks
    by_bytes = (marks.high_bytes or 0) // plan.max_sample_bytes
    table.add_row(
        "samples in flight",
        f"up to {marks.high_refs} ({by_bytes} of full length), on again at {marks.resume_refs}",
    )
    table.add_row(
        "memory in the store",
        f"up to {_size(marks.high_bytes or 0)} in flight, of {_size(plan.store_capacity)}",
    )
    table.add_row("memory for transfers", _transfers(plan))
    table.add_row("reference channel", spec.channel.url or "files in the run's directory")
    return table


def _parts(spec: RunSpec) -> str:
    """Say in how many parts a window is trained."""
    shared_by = spec.training.context_parallel
    return f"{spec.world_size} ranks" + (f" / {shared_by}" if shared_by > 1 else "")


def _memory(plan: RunPlan) -> Table:
    table = Table("process", "takes about", "of which", title="Memory, estimated", title_justify="left")
    for process in memory_of(plan):
        parts = ", ".join(f"{what} {_size(size)}" for what, size in process.parts)
        table.add_row(process.process, _size(process.total), parts)
    return table


def _captured(capture: Capture) -> str:
    layers = ", ".join(str(layer) for layer in capture.layers)
    return f"{layers}; and the last hidden state" if capture.last_hidden_state else layers


def _transfers(plan: RunPlan) -> str:
    """Say what memory a process takes to put or to get samples: one direction for copies, one for samples in place."""
    usual, most = 2 * plan.staging_bytes, 2 * plan.staging_bytes * most_regions(plan.staging_bytes)
    writer = "in each SGLang server" if plan.spec.target.backend == "sglang" else "in the producer"
    ranks = f"in each of {plan.spec.world_size} ranks" if plan.spec.world_size > 1 else "in the trainer"
    return f"up to {_size(usual)} {writer} and {ranks}, for a minute after failed transfers up to {_size(most)}"


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / _MIB:.1f} MiB"
