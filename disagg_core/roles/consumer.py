"""The consumer's process: what `python -m torch.distributed.run ... -m disagg_core.roles.consumer <role.json>` runs.

Rank 0 claims the channel, writes progress and the outcome; the other ranks follow its lead. A rank that fails leaves a
note of why before it goes, so that rank 0, which only sees a broken connection, can name the true cause.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch
from pydantic import JsonValue

from disagg_core.channel import StreamingRefChannel
from disagg_core.contracts import RunIdentity
from disagg_core.drafts.method import DraftModel, FrozenParts
from disagg_core.drafts.vocab import VocabMap, version_of
from disagg_core.drafts.warm_start import read_warm_start
from disagg_core.errors import ChannelError, ChannelStalled, DraftlineError, PeerFailed, Preempted, RoleFailed, classify
from disagg_core.processes.intake import IntakeNotes, noted
from disagg_core.processes.interrupt import interruptible
from disagg_core.processes.launch import die_with_parent
from disagg_core.processes.retry import wait_until
from disagg_core.processes.stop_signal import StopSignal
from disagg_core.roles.connections import open_channel, open_store
from disagg_core.run.environment import write_environment
from disagg_core.run.heldout import HeldOutFiles
from disagg_core.run.outcomes import exit_with, read_outcome, write_failure, write_outcome
from disagg_core.run.plan import PlannedDraft, RoleAssignment, RunPlan
from disagg_core.run.progress import ProgressFile
from disagg_core.target.parts import load_target_parts
from disagg_core.training.consumer import DraftToTrain, build_disagg_online_consumer
from disagg_core.training.distributed import Ranks
from disagg_core.training.heldout import HeldOutPlan
from disagg_core.training.inputs import Selection
from disagg_core.training.observers import (
    GivenUpObserver,
    LapObserver,
    MetricsObserver,
    Observers,
    ProgressObserver,
)
from disagg_core.training.profiling import ProfileObserver
from disagg_core.training.progress import TrainOutcome
from disagg_core.training.staging import let_the_step_go_first
from disagg_core.training.trainer import StepObserver
from disagg_core.training.watchdog import Watchdog

POLL_S = 0.2
NAMES_S = 90.0
"""How long an NFS mount may go on saying that there is no such file (acdirmax is 60 s)."""
PEER_NOTE_S = 5.0
"""How long rank 0 looks for another rank's note of its failure."""

_log = logging.getLogger(__name__)


def run_consumer(assignment: RoleAssignment, *, stop: StopSignal | None = None) -> TrainOutcome:
    """Train the drafts of `assignment` from its attempt's stream; returns at its end or at max_steps.

    Waits for the vocabulary map that the producer derives, continues the newest whole checkpoint, and leaves progress
    in ``state/consumer.json`` and the outcome in ``state/consumer-outcome.json`` (rank 0).

    Raises:
        Preempted: SIGTERM came; a checkpoint was saved.
        DraftlineError: whatever else ended training; channel and outcome file say so too.
    """
    started = time.time()
    stop = stop or StopSignal("consumer")
    section = assignment.plan.spec.training
    let_the_step_go_first()
    if section.cpu_threads is not None:
        torch.set_num_threads(section.cpu_threads)
    state = assignment.dir.state
    with Ranks.join(section.device) as ranks:
        limit_s = assignment.plan.spec.orchestration.stall_timeout_s

        def stalled(error: DraftlineError) -> None:
            write_failure(_outcome_path(state, ranks.rank), started, error)

        try:
            with Watchdog(f"rank {ranks.rank} of the consumer", limit_s, on_stall=stalled) as watchdog:
                outcome, counters = _train(assignment, ranks, stop, watchdog)
        except BaseException as error:
            _log.exception("rank %d of the consumer failed", ranks.rank)
            write_failure(_outcome_path(state, ranks.rank), started, _true_cause(error, state, ranks))
            raise
        if ranks.is_first:
            write_outcome(_outcome_path(state, 0), started, result_of(outcome, counters))
        return outcome


def result_of(outcome: TrainOutcome, counters: dict[str, float]) -> dict[str, JsonValue]:
    """Return what the outcome file says of a fit, in JSON's own types: a pair is a list there."""
    result = {**msgspec.to_builtins(outcome), "store_counters": counters}
    said: dict[str, JsonValue] = msgspec.json.decode(msgspec.json.encode(result))
    return said


def _outcome_path(state: Path, rank: int) -> Path:
    return state / ("consumer-outcome.json" if rank == 0 else f"consumer-rank{rank}-failure.json")


def _true_cause(error: BaseException, state: Path, ranks: Ranks) -> BaseException:
    """Return the failure that another rank noted, if all that this one saw was its connection breaking.

    A rank that was killed leaves no note: the broken connection is then all that is known, and classed as what it is.
    """
    if ranks.size == 1 or not ranks.is_first:
        return error
    if isinstance(error, DraftlineError) and not isinstance(error, PeerFailed):
        return error
    if classify(error) not in ("bug", "infrastructure"):
        return error

    def noted() -> RoleFailed | None:
        for rank in range(1, ranks.size):
            note = read_outcome(_outcome_path(state, rank))
            if note is not None and note.failure_class not in (None, "infrastructure"):
                return RoleFailed(f"rank {rank}: {note.message}", note.failure_class)
        return None

    return wait_until(noted, timeout_s=PEER_NOTE_S, every_s=POLL_S) or error


def _train(
    assignment: RoleAssignment, ranks: Ranks, stop: StopSignal, watchdog: Watchdog
) -> tuple[TrainOutcome, dict[str, float]]:
    """Open channel and store, build the drafts, train; return the outcome with the store client's counters."""
    plan, spec = assignment.plan, assignment.plan.spec
    progress = ProgressFile(assignment.dir.state / "consumer.json")
    if ranks.is_first:
        write_environment(assignment.dir.state / "consumer-environment.json")
    with contextlib.ExitStack() as stack:
        channel = stack.enter_context(open_channel(assignment)) if ranks.is_first else None
        try:
            shown = progress if ranks.is_first else None
            with interruptible(stop.check):
                maps = [
                    _wait_for_vocab_map(assignment, draft.dir.vocab_map, channel, shown, stop, watchdog.note)
                    for draft in plan.drafts
                ]
            watchdog.note("building the drafts")
            with noted(IntakeNotes("building the drafts", watchdog.note)):
                drafts, parts = _build_drafts(plan, maps, ranks.device)
            expected = plan.identity(assignment.attempt, version_of(maps))
            if channel is not None:
                channel.expect(expected)
            store = stack.enter_context(open_store(assignment, expected))
            trainer, loader = build_disagg_online_consumer(
                channel=channel,
                store=store,
                drafts=drafts,
                parts=parts,
                section=spec.training,
                total_steps=plan.total_steps,
                ranks=ranks,
                checkpoints=plan.dir.checkpoints,
                keep=spec.archive.keep,
                seed=spec.run.seed,
                identity=checkpoint_identity(assignment, expected.vocab_map_version),
                heldout=_held_out(plan, expected),
                observer=_observers(assignment, progress) if ranks.is_first else None,
                on_progress=watchdog.note,
            )
            stop.forward_to(lambda _: loader.request_stop())
        except BaseException as error:
            if channel is not None:
                with contextlib.suppress(ChannelError, Preempted), interruptible(stop.check):
                    channel.abandon(f"{type(error).__name__}: {error}", classify(error))
            raise
        outcome = trainer.fit(loader)
        watchdog.note("closing store and channel")
        return outcome, {f"consumer_{name}": float(value) for name, value in store.counters.items()}


def _wait_for_vocab_map(
    assignment: RoleAssignment,
    path: Path,
    channel: StreamingRefChannel | None,
    progress: ProgressFile | None,
    stop: StopSignal,
    on_progress: Callable[[str], None] = lambda what: None,
) -> VocabMap:
    """Return a draft's vocabulary map as soon as the producer has written it to `path`.

    A target that continues prompts to count their tokens may take long: only a producer that makes no progress is
    given up. Rank 0 judges that; the others are stopped with it.

    Raises:
        ProducerFailed: the producer failed before it wrote one.
        ChannelStalled: the producer made no progress for the stall timeout.
    """
    limit_s = assignment.plan.spec.orchestration.stall_timeout_s
    seen, since = 0, time.monotonic()
    while not path.is_file():
        on_progress("waiting for the vocabulary map")
        if progress is not None:
            progress.update(phase="waiting for the vocabulary map", step=0)
        if channel is not None and (done := _producer_progress(channel, path, limit_s, stop)) != seen:
            seen, since = done, time.monotonic()
        if channel is not None and time.monotonic() - since > limit_s:
            raise ChannelStalled(
                f"expected the producer to get on towards {path} within {limit_s:g} s (orchestration.stall_timeout_s): "
                f"{channel.writer_status().describe()}; see its log"
            )
        stop.wait(POLL_S)
    return VocabMap.load(path)


def _producer_progress(channel: StreamingRefChannel, awaited: Path, limit_s: float, stop: StopSignal) -> int:
    """Return a number that grows with the producer's progress.

    Raises:
        ProducerFailed, RoleFailed: the stream has its end although `awaited`, which comes before its first reference,
            is not there.
    """
    status = channel.writer_status()
    if status.terminal and not awaited.is_file():
        channel.check_not_failed()
        # A network mount may believe for a minute that a file is not there which another host has made.
        wait_s = min(NAMES_S, limit_s)
        if not wait_until(awaited.is_file, timeout_s=wait_s, every_s=POLL_S, on_wait=stop.check):
            raise RoleFailed(f"{status.describe()}, but {awaited} is not there; see the producer's log")
    return status.claim.progress if status.claim is not None else 0


def _build_drafts(
    plan: RunPlan, maps: Sequence[VocabMap], device: torch.device
) -> tuple[list[DraftToTrain], FrozenParts]:
    """Return the drafts, seeded or continued from their `init_from`, attached to the target's parts, and these."""
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, plan.target.dtype)
    loaded = load_target_parts(plan.spec.target, dtype=dtype)
    embedding, lm_head = loaded.embedding.to(device), loaded.lm_head.to(device)
    parts = FrozenParts(embedding, lm_head, loaded.logit_cap, loaded.logit_scale, loaded.embedding_scale)
    drafts = []
    for draft, vocab_map in zip(plan.drafts, maps, strict=True):
        model = _build_draft(draft, vocab_map, plan.spec.run.seed)
        model.attach(parts, vocab_map)
        selection = Selection(plan.capture, draft.capture)
        drafts.append(DraftToTrain(model, draft.section, draft.folder, selection))
    return drafts, parts


def _build_draft(draft: PlannedDraft, vocab_map: VocabMap, seed: int) -> DraftModel:
    """Return a draft whose fresh weights depend on the run's `seed` and on no other draft."""
    torch.manual_seed(seed)
    if draft.init_path is None:
        config = draft.method.config_for(draft.section, draft.target, draft.capture, draft.vocabulary.size)
        return draft.method.fresh(draft.section, config)
    _, config, state = read_warm_start(draft.init_path, draft.section, draft.target, draft.capture)
    return draft.method.continued(config, state, draft.target, draft.capture, vocab_map)


def checkpoint_identity(assignment: RoleAssignment, vocab_map_version: str) -> dict[str, str]:
    """Return what a checkpoint must share with the run that continues it."""
    identity = assignment.plan.identity(assignment.attempt, vocab_map_version)
    return {
        "run_id": identity.run_id,
        "strategy": identity.strategy,
        "target": identity.target_model_version,
        "tokenizer": identity.tokenizer_version,
        "vocab_map": identity.vocab_map_version,
        "aux_layers": "; ".join(",".join(map(str, draft.capture.layers)) for draft in assignment.plan.drafts),
    }


def _held_out(plan: RunPlan, identity: RunIdentity) -> HeldOutPlan | None:
    section = plan.spec.training.heldout
    if section is None:
        return None
    return HeldOutPlan(HeldOutFiles(plan.dir.heldout, identity), section, plan.spec.training.early_stop)


def _observers(assignment: RoleAssignment, progress: ProgressFile) -> Observers:
    plan = assignment.plan
    observers: list[StepObserver] = [
        ProgressObserver(progress, plan.total_steps),
        LapObserver(plan.dir.phases),
        GivenUpObserver(assignment.dir.quarantined),
    ]
    if plan.spec.training.profile is not None:
        observers.append(ProfileObserver(plan.spec.training.profile, plan.dir.profiles))
    observers += [
        MetricsObserver(draft.dir.train_metrics, draft.folder, draft.dir.heldout_metrics) for draft in plan.drafts
    ]
    return Observers(*observers)


def main(arguments: list[str]) -> None:
    """Run the role described by the JSON file named in `arguments`, and exit."""
    if "LOCAL_RANK" in os.environ:  # torchrun's ranks have sessions of their own, and nobody without torchrun
        die_with_parent(signal.SIGKILL)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    assignment = RoleAssignment.model_validate_json(Path(arguments[0]).read_bytes())
    stop = StopSignal("consumer")
    stop.install()
    exit_with(lambda: run_consumer(assignment, stop=stop))


if __name__ == "__main__":
    main(sys.argv[1:])
