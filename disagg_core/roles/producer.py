"""The producer's process: what `python -m disagg_core.roles.producer <role.json>` runs.

Reads its assignment, derives the vocabulary map if the run has none, drives the prompts through the target, and leaves
metrics, progress, the list of rejected prompts and its outcome in the run's directory. However it ends, short of being
killed, the stream says so.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from disagg_core.channel import StreamingRefChannel
from disagg_core.contracts import PromptTask, StreamTotals
from disagg_core.drafts.vocab import version_of
from disagg_core.engines.contract import Target
from disagg_core.engines.registry import target_of
from disagg_core.errors import ChannelError, DraftlineError, IdentityMismatch, classify
from disagg_core.ordinals import OrdinalSet
from disagg_core.processes.intake import IntakeNotes, noted
from disagg_core.processes.interrupt import interruptible
from disagg_core.processes.stop_signal import StopSignal
from disagg_core.prompts.pool import EncodedPrompts
from disagg_core.roles.connections import open_channel, open_store
from disagg_core.roles.producer_files import RejectedFile, Reporter
from disagg_core.rollout.continuations import ContinuationLog, ContinuedTarget, Origin
from disagg_core.rollout.heldout import capture_held_out
from disagg_core.rollout.pace import Pace
from disagg_core.rollout.pipeline import largest_group
from disagg_core.rollout.producer import Drive, build_disagg_online_producer
from disagg_core.rollout.prompt_source import PromptSource
from disagg_core.rollout.vocab_counts import vocab_maps_of
from disagg_core.rollout.work import WorkNotes
from disagg_core.run.environment import write_environment
from disagg_core.run.heldout import HeldOutFiles
from disagg_core.run.metrics import JsonlMetrics
from disagg_core.run.outcomes import exit_with, write_failure, write_outcome
from disagg_core.run.plan import RoleAssignment, RunPlan
from disagg_core.run.progress import ProgressFile, ProgressValue
from disagg_core.settings import get_settings
from disagg_core.store import MooncakeFeatureStore
from disagg_core.target.tokenizer import load_tokenizer, version_in_use

log = logging.getLogger(__name__)

_LEASES_PER_REQUEST = 4


def run_producer(assignment: RoleAssignment, *, stop: StopSignal | None = None) -> StreamTotals:
    """Produce the samples of `assignment` and return the totals of its stream.

    Leaves the outcome in ``state/producer-outcome.json``.

    Raises:
        Preempted: SIGTERM came; the stream ended as failed, class ``preempted``.
        DraftlineError: whatever else ended the run; stream and outcome file say so too.
    """
    started = time.time()
    outcome = assignment.dir.state / "producer-outcome.json"
    progress = ProgressFile(assignment.dir.state / "producer.json")
    try:
        totals, result = _produce(assignment, progress, stop or StopSignal("producer"))
    except BaseException as error:
        log.exception("the producer failed")
        write_failure(outcome, started, error)
        progress.update(phase="failed", reason=str(error))
        progress.flush()
        raise
    write_outcome(outcome, started, result)
    progress.update(phase="ended", published=totals.refs, rejected=totals.rejected)
    progress.flush()
    return totals


def _produce(
    assignment: RoleAssignment, progress: ProgressFile, stop: StopSignal
) -> tuple[StreamTotals, dict[str, Any]]:
    write_environment(assignment.dir.state / "producer-environment.json", get_settings().sglang_python)
    with contextlib.ExitStack() as stack:
        channel = stack.enter_context(open_channel(assignment))
        with _failures_told(channel):
            store = stack.enter_context(open_store(assignment))
            drive, target, source = _assemble(assignment, channel, store, progress, stop, stack)
            stop.forward_to(drive.request_stop)
        totals = drive()
        result: dict[str, Any] = {
            **msgspec.to_builtins(totals),
            "skipped": source.covered,
            "store_counters": {f"producer_{name}": float(value) for name, value in store.counters.items()},
            "figures": drive.figures,
            "servers": [vars(server) for server in target.health()],
        }
        return totals, result


@contextlib.contextmanager
def _failures_told(channel: StreamingRefChannel) -> Iterator[None]:
    """End the stream with a failure when what is inside raises."""
    channel.claim_writer()
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(ChannelError):
            channel.fail(str(error) if isinstance(error, DraftlineError) else repr(error), classify(error))
        raise


def _assemble(
    assignment: RoleAssignment,
    channel: StreamingRefChannel,
    store: MooncakeFeatureStore,
    progress: ProgressFile,
    stop: StopSignal,
    stack: contextlib.ExitStack,
) -> tuple[Drive, Target, PromptSource]:
    """Load tokenizer and target, derive the vocabulary map, open the prompts; return the producer ready to run."""
    plan, spec = assignment.plan, assignment.plan.spec
    if spec.target.cpu_threads is not None:
        torch.set_num_threads(spec.target.cpu_threads)

    def enter(phase: str, **fields: ProgressValue) -> None:
        stop.check()
        progress.update(phase=phase, **fields)
        if not fields:  # a phase that has no news for long
            progress.flush()
        channel.note_progress(f"{phase} {fields}" if fields else phase)

    def servers_start() -> None:  # for target.unavailable_timeout_s at most
        stop.check()
        channel.note_progress("waiting for the target's servers")

    enter("reading prompts", prompts=0, total_prompts=plan.total_prompts)
    pool = _open_prompts(plan, stack)
    enter("loading the target")
    target = target_of(
        spec, plan.target, plan.capture, store=store, log_dir=assignment.dir.logs, while_waiting=servers_start
    )
    stack.callback(target.close)
    known = 0
    if spec.data.generate is not None:
        continuations = ContinuationLog(plan.dir.continuations, Origin.of(plan))
        stack.callback(continuations.close)
        target, known = ContinuedTarget(target, continuations), len(continuations)
    with noted(IntakeNotes("loading the target", channel.note_progress)):
        target.prepare(plan.identity(assignment.attempt, ""))
    identity = plan.identity(assignment.attempt, _vocab_version(plan, pool, target, known, enter, stop, channel))
    target.prepare(identity)
    if spec.training.heldout is not None:
        files = HeldOutFiles(plan.dir.heldout, identity)
        with interruptible(stop.check), noted(WorkNotes(target, channel.note_progress)):
            capture_held_out(plan, pool, target, store, files, lambda done: enter("held-out samples", captured=done))
    source = _open_source(assignment, pool, target, stack)
    metrics = stack.enter_context(JsonlMetrics(plan.dir.rollout_metrics))
    _, drive = build_disagg_online_producer(
        prompts=source,
        target=target,
        store=store,
        channel=channel,
        identity=identity,
        rollout=spec.rollout,
        window=spec.global_batch_size,
        watermarks=plan.watermarks,
        bytes_of=_sample_bytes(plan),
        unavailable_timeout_s=spec.target.unavailable_timeout_s,
        on_tick=Reporter(assignment, metrics, progress, target, store, covered=source.covered),
    )
    return drive, target, source


def _open_prompts(plan: RunPlan, stack: contextlib.ExitStack) -> EncodedPrompts:
    tokenizer = load_tokenizer(plan.spec.target)
    _check_tokenizer(plan, tokenizer)
    pool = EncodedPrompts(plan.spec, tokenizer, plan.data, plan.target)
    stack.callback(pool.close)
    return pool


def _vocab_version(
    plan: RunPlan,
    pool: EncodedPrompts,
    target: Target,
    known: int,
    enter: Callable[..., None],
    stop: StopSignal,
    channel: StreamingRefChannel,
) -> str:
    """Derive the vocabulary maps that the run has not yet; return their version. `known` continuations are at hand."""
    cache = get_settings().home / "vocab_maps"
    pace = Pace()
    doing = "continuing" if plan.spec.data.generate is not None else "counting the tokens of"
    enter("vocabulary map" if plan.dir.vocab_map.is_file() else f"{doing} prompts for the vocabulary map")

    def progress(done: int, total: int | None) -> None:
        nonlocal pace
        if done <= known:
            pace = Pace(begun=done)
        of = "" if total is None else f" of {total}"
        enter(f"{doing} {done}{of} prompts for the vocabulary map", counted=done, of=total, **pace.fields(done, total))

    with interruptible(stop.check), noted(WorkNotes(target, channel.note_progress)):
        return version_of(vocab_maps_of(plan, pool, target, cache=cache, progress=progress))


def _open_source(
    assignment: RoleAssignment,
    pool: EncodedPrompts,
    target: Target,
    stack: contextlib.ExitStack,
) -> PromptSource:
    """Return the prompts without those that are trained or rejected already; further rejected ones go to the file."""
    plan = assignment.plan
    rejected = stack.enter_context(RejectedFile(assignment.dir.rejected))
    source = PromptSource(
        pool,
        group=largest_group(plan.watermarks, target.batch_size),
        skip=_covered(assignment.dir.state / "skip.json"),
        already_rejected=rejected.ordinals,
        max_attempts=plan.spec.rollout.max_prompt_attempts,
        lease_s=_lease_s(plan),
        on_reject=rejected.write,
    )
    stack.callback(source.close)
    return source


def _check_tokenizer(plan: RunPlan, tokenizer: Any) -> None:
    found = version_in_use(tokenizer, plan.spec.data)
    if plan.tokenizer_version and found != plan.tokenizer_version:
        raise IdentityMismatch(
            f"expected tokenizer and chat template {plan.tokenizer_version}, as the plan of {plan.run_id} says, found "
            f"{found}: the target's directory has changed since the run was planned, or differs on this machine"
        )


def _sample_bytes(plan: RunPlan) -> Any:
    """Return a function from a task to the most bytes its sample can take."""
    generate = plan.spec.data.generate
    more = generate.max_new_tokens if generate is not None else 0
    slack = plan.max_sample_bytes - plan.spec.data.max_tokens * plan.bytes_per_token

    def sample_bytes(task: PromptTask) -> int:
        tokens = min(len(task.input_ids) + more, plan.spec.data.max_tokens)
        return tokens * plan.bytes_per_token + slack

    return sample_bytes


def _lease_s(plan: RunPlan) -> float:
    """Return how long a worker may hold a prompt: a hung server's requests end by themselves well before."""
    target = plan.spec.target
    return _LEASES_PER_REQUEST * target.request_timeout_s if target.backend == "sglang" else float("inf")


def _covered(path: Path) -> OrdinalSet:
    """Return the ordinals that the checkpoint of an earlier attempt covers (ranges, if there is a file)."""
    return (
        OrdinalSet(msgspec.json.decode(path.read_bytes(), type=list[tuple[int, int]]))
        if path.is_file()
        else OrdinalSet()
    )


def main() -> None:
    """Run the role of the assignment file given as the only argument, and exit."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = StopSignal("producer")
    stop.install()
    assignment = RoleAssignment.model_validate_json(Path(sys.argv[1]).read_bytes())
    exit_with(lambda: run_producer(assignment, stop=stop))


if __name__ == "__main__":
    main()
