"""After the end of the stream: is every sample accounted for, and is the store empty?

The figures are found out first and judged when the draft is exported and archived: no judgement costs the draft.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path

import msgspec
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from pydantic import BaseModel, ConfigDict, Field

from disagg_core.errors import RoleFailed, StoreError, TooManyLost
from disagg_core.ordinals import OrdinalSet
from disagg_core.prompts.bad_records import count_reasons
from disagg_core.report.accounting import Accounting
from disagg_core.report.document import BestFigures, DraftFigures, ServerFigures, TrainingFigures
from disagg_core.run.directory import RunDir
from disagg_core.run.known import read_document
from disagg_core.run.metrics import read_metrics
from disagg_core.run.outcomes import EARLY_STOP, MAX_STEPS, RoleOutcome
from disagg_core.run.plan import PlannedDraft, RunPlan
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.store.master import MasterView
from tasks.mooncake import sweep
from tasks.roles import Role, RoleRun


class Completion(BaseModel):
    """The end of a run's training. `refused_reasons` are those among the `rejected_reasons` that are not the data's.

    `checkpoint` is the last one; where training stopped early, `best` has that of each draft's best, by its folder.
    """

    model_config = ConfigDict(frozen=True)

    accounting: Accounting
    training: TrainingFigures
    drafts: list[DraftFigures]
    checkpoint: Path
    best: dict[str, Path] = {}
    first_checkpoint: Path
    store_counters: dict[str, float]
    rejected_reasons: dict[str, int]
    refused_reasons: dict[str, int] = {}
    quarantined_reasons: dict[str, int] = {}
    servers: list[ServerFigures]

    def checkpoint_of(self, draft: PlannedDraft) -> Path:
        """Return where the draft lies that came of training: its best if that stopped early, else the last."""
        return draft.checkpoint_in(self.best.get(draft.folder, self.checkpoint))


@task(name="verify-completion", task_run_name="completion", cache_policy=NO_CACHE)
async def verify_completion(
    plan: RunPlan, attempt: int, endpoints: StoreEndpoints, runs: dict[Role, RoleRun]
) -> Completion:
    """Put the end-of-stream totals beside what was trained, and sweep the store; `judge_training` says if it will do.

    Raises:
        RoleFailed: a role that completed left no outcome.
    """
    producer, consumer = _result(runs["producer"]), _result(runs["consumer"])
    left, evicted = await _swept(plan, endpoints)
    completion = complete(plan, attempt, producer, consumer, keys_left=left, evicted=evicted)
    get_run_logger().info("accounting: %s", completion.accounting)
    return completion


async def _swept(plan: RunPlan, endpoints: StoreEndpoints) -> tuple[int | None, int]:
    """Return how many samples of the run were left in the store, None if it is gone, and how many it had evicted."""
    log = get_run_logger()
    try:
        evicted = MasterView(endpoints).health().evicted
        if evicted:  # an alarm: what was evicted is captured again, but only we may free a sample
            log.error("the store has evicted %d objects, expected none", evicted)
        return await sweep(plan, endpoints, f"{plan.run_id}/"), evicted
    except StoreError as error:
        log.error("the training is complete; the store was lost before what was left in it was counted: %s", error)
        return None, 0


def judge_training(plan: RunPlan, completion: Completion) -> None:
    """Raise if the run's numbers do not add up, or more came to nothing than the run document allows.

    Of what the target refused, prompts whose own form cannot be used do not count. One prompt, and the samples of one
    optimizer step, are always allowed: of a small run they are a large share.

    Raises:
        AccountingError: a sample is unaccounted for, or was left in the store.
        TooManyLost: the target refused, or the trainer quarantined, too much.
    """
    accounting, spec = completion.accounting, plan.spec
    accounting.check()
    refused = sum(completion.refused_reasons.values())
    if refused > max(1, spec.rollout.max_rejected * accounting.prompts):
        often = "; ".join(f"{count} x {why}" for why, count in Counter(completion.refused_reasons).most_common(3))
        raise TooManyLost(
            f"{refused} of {accounting.prompts} prompts were refused or quarantined for other reasons than their own "
            f"form, rollout.max_rejected allows {spec.rollout.max_rejected:.1%}: {often}. The draft is exported and "
            "archived; look at the target's GPU and log, or give the next run a larger share"
        )
    allowed = max(spec.global_batch_size, spec.training.max_quarantined * accounting.published)
    if accounting.quarantined > allowed:
        raise TooManyLost(
            f"{accounting.quarantined} of {accounting.published} samples were quarantined by the trainer, "
            f"training.max_quarantined allows {spec.training.max_quarantined:.1%}; quarantined.jsonl in the attempts' "
            "states names each with its reason. The draft is exported and archived; look at the target's states, or "
            "give the next run a larger share"
        )


def complete(
    plan: RunPlan,
    attempt: int,
    producer: RoleOutcome,
    consumer: RoleOutcome,
    *,
    keys_left: int | None,
    evicted: int = 0,
) -> Completion:
    """Put the figures of both roles together. What the sweep found where no further step was to be taken was unused.

    `keys_left` is None where the store is gone: nothing is left in it, and what was unused is what was not trained.
    """
    from disagg_core.training.checkpoint import checkpoint_path, untrained_checkpoint

    made, trained = _Produced.model_validate(producer.result), _Trained.model_validate(consumer.result)
    published = made.skipped + made.refs
    unused = 0
    if trained.reason in (MAX_STEPS, EARLY_STOP):
        not_trained = max(0, published - trained.samples - trained.quarantined)
        unused = not_trained if keys_left is None else keys_left + trained.lost
        keys_left = 0
    drafts = [trained.of(draft) for draft in plan.drafts]
    rejections = _rejections(plan, attempt)
    return Completion(
        accounting=Accounting(
            prompts=made.skipped + made.prompts,
            rejected=made.rejected,
            published=published,
            trained=trained.samples,
            quarantined=trained.quarantined,
            unused=unused,
            store_keys_left=keys_left or 0,
        ),
        training=TrainingFigures(
            steps=trained.steps,
            samples_per_second=trained.samples_per_second,
            loss_first=drafts[0].loss_first if len(drafts) == 1 else None,
            loss_last=drafts[0].loss_last if len(drafts) == 1 else None,
        ),
        drafts=drafts,
        checkpoint=plan.dir.checkpoints / trained.checkpoint,
        best={
            draft.folder: checkpoint_path(plan.dir.checkpoints, best.step)
            for draft in plan.drafts
            if trained.reason == EARLY_STOP and (best := trained.drafts[draft.folder].best) is not None
        },
        first_checkpoint=untrained_checkpoint(plan.dir.checkpoints),
        store_counters={**made.store_counters, **trained.store_counters, "evicted": evicted},
        rejected_reasons=count_reasons(record.reason for record in rejections),
        refused_reasons=count_reasons(record.reason for record in rejections if record.kind != "rejected"),
        quarantined_reasons=count_reasons(_quarantines(plan, OrdinalSet(trained.quarantined_ordinals))),
        servers=made.servers,
    )


def read_completion(run: RunDir) -> Completion | None:
    """Return the end of a run's training, if an earlier process of the run came so far.

    Raises:
        OtherVersion: it was written by another version.
    """
    return read_document(run.completion, Completion) if run.completion.is_file() else None


class _Produced(BaseModel):
    prompts: int
    refs: int
    rejected: int
    skipped: int = 0
    store_counters: dict[str, float] = {}
    servers: list[ServerFigures] = []


class _TrainedDraft(BaseModel):
    """What is read of a draft's progress."""

    steps: int = Field(validation_alias="step")
    skipped: int
    seconds: float
    loss_first: float | None
    loss_last: float | None
    best: BestFigures | None = None


class _Trained(BaseModel):
    steps: int
    samples: int
    quarantined: int
    quarantined_ordinals: list[tuple[int, int]] = []
    lost: int = 0
    reason: str
    checkpoint: str
    samples_per_second: float
    drafts: dict[str, _TrainedDraft]
    parameters: dict[str, int]
    store_counters: dict[str, float] = {}

    def of(self, draft: PlannedDraft) -> DraftFigures:
        """Return what is known of a draft when it is trained."""
        return DraftFigures(
            name=draft.name,
            method=draft.section.method,
            title=draft.section.title,
            parameters=self.parameters[draft.folder],
            **self.drafts[draft.folder].model_dump(),
        )


def _result(run: RoleRun) -> RoleOutcome:
    if run.outcome is None:
        raise RoleFailed(f"the {run.role} completed but left no outcome; see its log")
    return run.outcome


class _Rejected(msgspec.Struct):
    """What is read of a line of ``rejected.jsonl``."""

    reason: str
    kind: str = "rejected"


def _rejections(plan: RunPlan, attempt: int) -> list[_Rejected]:
    """Return what was rejected; lines that cannot be read are passed over, as a restarted producer does."""
    path = plan.dir.attempt(attempt).rejected
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            found.append(msgspec.json.decode(line, type=_Rejected))
    return found


def _quarantines(plan: RunPlan, ordinals: OrdinalSet) -> list[str]:
    """Return why each sample of `ordinals` was quarantined, as the last attempt that met it said."""
    reasons: dict[object, str] = {}
    for attempt in plan.dir.begun_attempts():
        for record in read_metrics(plan.dir.attempt(attempt).quarantined):
            if record.get("ordinal") in ordinals:
                reasons[record["ordinal"]] = str(record.get("reason"))
    return list(reasons.values())
