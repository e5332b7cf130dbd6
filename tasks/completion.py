"""After the end of the stream: is every sample accounted for, and is the store empty?"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from pydantic import BaseModel, ConfigDict

from disagg_core.errors import RoleFailed, TooManyLost
from disagg_core.report.accounting import Accounting
from disagg_core.report.document import ServerFigures, TrainingFigures
from disagg_core.run.directory import RunDir
from disagg_core.run.known import read_document
from disagg_core.run.outcomes import RoleOutcome
from disagg_core.run.plan import RunPlan
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.store.master import MasterView
from tasks.mooncake import sweep
from tasks.roles import Role, RoleRun


class Completion(BaseModel):
    """The checked end of a run's training."""

    model_config = ConfigDict(frozen=True)

    accounting: Accounting
    training: TrainingFigures
    checkpoint: Path
    first_checkpoint: Path
    store_counters: dict[str, float]
    rejected_reasons: dict[str, int]
    servers: list[ServerFigures]


@task(name="verify-completion", task_run_name="completion", cache_policy=NO_CACHE)
async def verify_completion(
    plan: RunPlan, attempt: int, endpoints: StoreEndpoints, runs: dict[Role, RoleRun]
) -> Completion:
    """Compare the end-of-stream totals with what was trained, and sweep the store.

    Raises:
        AccountingError: the numbers do not add up, or samples were left in the store.
        TooManyLost: they add up, but too much came to nothing.
    """
    evicted = MasterView(endpoints).health().evicted
    if evicted:  # an alarm: what was evicted is captured again, but only we may free a sample
        get_run_logger().error("the store has evicted %d objects, expected none", evicted)
    left = await sweep(plan, endpoints, f"{plan.run_id}/")
    producer, consumer = _result(runs["producer"]), _result(runs["consumer"])
    completion = complete(plan, attempt, producer, consumer, keys_left=left, evicted=evicted)
    get_run_logger().info("accounting: %s", completion.accounting)
    completion.accounting.check()
    check_losses(plan, attempt, completion)
    return completion


def check_losses(plan: RunPlan, attempt: int, completion: Completion) -> None:
    """Raise `TooManyLost` if the target refused, or the trainer quarantined, more than the run document allows.

    Prompts whose own form cannot be used do not count. One prompt, and the samples of one optimizer step, are always
    allowed: of a small run they are a large share.
    """
    accounting, spec = completion.accounting, plan.spec
    reasons = Counter(record.reason for record in _rejections(plan, attempt) if record.kind != "rejected")
    refused = reasons.total()
    if refused > max(1, spec.rollout.max_rejected * accounting.prompts):
        often = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
        raise TooManyLost(
            f"{refused} of {accounting.prompts} prompts were refused or quarantined for other reasons than their own "
            f"form, rollout.max_rejected allows {spec.rollout.max_rejected:.1%}: {often}. The checkpoints are kept; "
            "look at the target's GPU and log, or raise the share"
        )
    allowed = max(spec.global_batch_size, spec.training.max_quarantined * accounting.published)
    if accounting.quarantined > allowed:
        raise TooManyLost(
            f"{accounting.quarantined} of {accounting.published} samples were quarantined by the trainer, "
            f"training.max_quarantined allows {spec.training.max_quarantined:.1%}; the consumer's log names each with "
            "its reason. The checkpoints are kept; look at the target's states, or raise the share"
        )


def complete(
    plan: RunPlan, attempt: int, producer: RoleOutcome, consumer: RoleOutcome, *, keys_left: int, evicted: int = 0
) -> Completion:
    """Put the figures of both roles together. What the sweep found after the last step of `max_steps` was unused."""
    from disagg_core.training.checkpoint import untrained_checkpoint

    made, trained = _Produced.model_validate(producer.result), _Trained.model_validate(consumer.result)
    earlier = made.skipped
    stopped_early = trained.reason == "max_steps"
    return Completion(
        accounting=Accounting(
            prompts=earlier + made.prompts,
            rejected=made.rejected,
            published=earlier + made.refs,
            trained=trained.samples,
            quarantined=trained.quarantined,
            unused=keys_left + trained.lost if stopped_early else 0,
            store_keys_left=0 if stopped_early else keys_left,
        ),
        training=TrainingFigures(
            steps=trained.steps,
            samples_per_second=trained.samples_per_second,
            loss_first=trained.loss_first,
            loss_last=trained.loss_last,
        ),
        checkpoint=plan.dir.checkpoints / trained.checkpoint,
        first_checkpoint=untrained_checkpoint(plan.dir.checkpoints),
        store_counters={**made.store_counters, **trained.store_counters, "evicted": evicted},
        rejected_reasons=dict(Counter(record.reason for record in _rejections(plan, attempt))),
        servers=made.servers,
    )


def read_completion(run: RunDir) -> Completion | None:
    """Return the checked end of a run's training, if an earlier process of the run came so far.

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


class _Trained(BaseModel):
    steps: int
    samples: int
    quarantined: int
    lost: int = 0
    reason: str
    checkpoint: str
    samples_per_second: float
    loss_first: float | None
    loss_last: float | None
    store_counters: dict[str, float] = {}


def _result(run: RoleRun) -> RoleOutcome:
    if run.outcome is None:
        raise RoleFailed(f"the {run.role} completed but left no outcome; see its log")
    return run.outcome


class _Rejected(msgspec.Struct):
    """What is read of a line of ``rejected.jsonl``."""

    reason: str
    kind: str = "rejected"


def _rejections(plan: RunPlan, attempt: int) -> list[_Rejected]:
    path = plan.dir.attempt(attempt).state / "rejected.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [msgspec.json.decode(line, type=_Rejected) for line in lines if line]
