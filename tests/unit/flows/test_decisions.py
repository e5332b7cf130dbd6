"""What the parent decides from what the roles leave behind."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import time
from pathlib import Path
from uuid import uuid4

import pytest

from disagg_core.errors import AccountingError, EvaluationFailed, RoleFailed, StoreUnavailable, TooManyLost
from disagg_core.report.document import EvaluationFigures
from disagg_core.run.attempts import AttemptOutcome
from disagg_core.run.outcomes import RoleOutcome
from disagg_core.run.plan import RoleAssignment, RunPlan, make_plan
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.target.facts import read_target_facts
from flows.online_disagg_training import online_disagg_training
from flows.train_consumer import launcher
from tasks import roles
from tasks.children import Supervision
from tasks.completion import Completion, complete, judge_training
from tasks.evaluation import judge_draft
from tasks.rendezvous import meet
from tasks.reporting import RunRecord
from tasks.roles import RoleRun, judge, watch_store

pytestmark = pytest.mark.unit

RUNS = Path(__file__).resolve().parents[3] / "infra" / "runs"


@pytest.fixture
def plan(tmp_path: Path) -> RunPlan:
    return a_plan(tmp_path)


def a_plan(root: Path, *overrides: str) -> RunPlan:
    spec = load_spec(RUNS / "qwen3-8b-eagle3.yaml", list(overrides))
    return make_plan(spec, read_target_facts(spec.target), run_id="run", root=root, total_prompts=100)


def role_run(role: str, state: str, outcome: RoleOutcome | None = None, message: str = "") -> RoleRun:
    return RoleRun(
        role=role,
        flow_run_id=uuid4(),
        work_pool="pool",
        state=state,
        message=message,
        started=None,
        ended=None,
        outcome=outcome,
    )


def done(**result: object) -> RoleOutcome:
    return RoleOutcome(state="completed", started=0, ended=1, result=result)


def failure(failure_class: str, message: str) -> RoleOutcome:
    return RoleOutcome(state="failed", failure_class=failure_class, message=message, started=0, ended=1)


def test_both_roles_done_is_a_finished_attempt() -> None:
    outcome = judge(1, role_run("producer", "Completed", done()), role_run("consumer", "Completed", done(lost=0)))
    assert outcome.finished


def test_lost_samples_ask_for_another_attempt() -> None:
    outcome = judge(1, role_run("producer", "Completed", done()), role_run("consumer", "Completed", done(lost=2)))
    assert not outcome.finished
    assert outcome.failure_class is None
    assert "2 samples" in outcome.describe()


def test_a_sample_that_was_lost_on_the_way_to_max_steps_asks_for_no_attempt(plan: RunPlan) -> None:
    trained = done(**TRAINED | {"samples": 7, "reason": "max_steps", "lost": 1})
    outcome = judge(1, role_run("producer", "Completed", done()), role_run("consumer", "Completed", trained))
    assert outcome.finished
    completion = complete(plan, 1, done(**PRODUCED), trained, keys_left=1)
    completion.accounting.check()
    assert completion.accounting.unused == 2


def test_a_cancelled_producer_is_not_the_cause_of_a_failed_consumer() -> None:
    consumer = role_run("consumer", "Failed", failure("out_of_memory", "CUDA out of memory"))
    outcome = judge(2, role_run("producer", "Cancelled"), consumer)
    assert outcome.failure_class == "out_of_memory"
    assert outcome.reason == "consumer: CUDA out of memory"


def test_a_cancelled_consumer_is_not_the_cause_of_a_dead_producer() -> None:
    consumer = role_run("consumer", "Cancelled", failure("preempted", "asked to stop"))
    outcome = judge(1, role_run("producer", "Failed", None, "killed by SIGKILL"), consumer)
    assert outcome.reason == "producer: killed by SIGKILL"


def test_a_consumer_that_failed_and_was_cancelled_while_it_ended_is_still_the_cause() -> None:
    consumer = role_run("consumer", "Cancelled", failure("store_lost", "the store is gone"))
    producer = role_run("producer", "Failed", failure("stalled", "stopped because the consumer is failed"))
    outcome = judge(1, producer, consumer)
    assert (outcome.failure_class, outcome.reason) == ("store_lost", "consumer: the store is gone")


def test_a_process_that_vanished_counts_as_preempted() -> None:
    outcome = judge(1, role_run("producer", "Completed", done()), role_run("consumer", "Crashed", None, "SIGKILL"))
    assert outcome.failure_class == "preempted"


PRODUCED = {"prompts": 6, "refs": 5, "rejected": 1, "skipped": 4}
TRAINED = {
    "steps": 3,
    "samples": 9,
    "quarantined": 0,
    "reason": "end of stream",
    "checkpoint": "step-3",
    "samples_per_second": 2.5,
    "parameters": {"": 1000},
    "drafts": {"": {"step": 3, "skipped": 0, "seconds": 1.0, "loss_first": 5.0, "loss_last": 2.0}},
}


def test_what_earlier_attempts_trained_counts_as_published(plan: RunPlan) -> None:
    completion = complete(plan, 2, done(**PRODUCED), done(**TRAINED), keys_left=0)
    completion.accounting.check()
    assert (completion.accounting.prompts, completion.accounting.published) == (10, 9)
    assert completion.checkpoint == plan.dir.checkpoints / "step-3"


def test_samples_beyond_the_last_step_are_unused_and_not_leaked(plan: RunPlan) -> None:
    trained = done(**TRAINED | {"samples": 7, "reason": "max_steps"})
    completion = complete(plan, 1, done(**PRODUCED), trained, keys_left=2)
    completion.accounting.check()
    assert completion.accounting.unused == 2
    for found in (1, 3):
        completion = complete(plan, 1, done(**PRODUCED), trained, keys_left=found)
        assert "published = trained + quarantined + unused does not hold" in completion.accounting.problems()[0]


def test_a_run_that_stopped_early_leaves_the_rest_unused_and_hands_out_its_best(plan: RunPlan) -> None:
    best = {"step": 2, "figure": "loss", "value": 1.5, "since": 3}
    drafts = {"": TRAINED["drafts"][""] | {"best": best}}
    stopped = TRAINED | {"samples": 7, "reason": "early_stop", "drafts": drafts, "lost": 1}
    assert judge(
        1, role_run("producer", "Completed", done()), role_run("consumer", "Completed", done(**stopped))
    ).finished
    completion = complete(plan, 1, done(**PRODUCED), done(**stopped), keys_left=1)
    completion.accounting.check()
    assert completion.accounting.unused == 2
    assert completion.checkpoint_of(plan.drafts[0]) == plan.dir.checkpoints / "step-2"
    assert completion.checkpoint == plan.dir.checkpoints / "step-3"
    assert completion.drafts[0].best is not None
    ended = complete(plan, 1, done(**PRODUCED), done(**TRAINED | {"drafts": drafts}), keys_left=0)
    assert ended.checkpoint_of(plan.drafts[0]) == plan.dir.checkpoints / "step-3"


def test_a_store_that_is_gone_at_the_end_costs_no_account(plan: RunPlan) -> None:
    judge_training(plan, complete(plan, 2, done(**PRODUCED), done(**TRAINED), keys_left=None))
    trained = done(**TRAINED | {"samples": 7, "reason": "max_steps"})
    completion = complete(plan, 1, done(**PRODUCED), trained, keys_left=None)
    judge_training(plan, completion)
    assert completion.accounting.unused == 2
    short = complete(plan, 2, done(**PRODUCED), done(**TRAINED | {"samples": 8}), keys_left=None)
    with pytest.raises(AccountingError, match="published = trained"):
        judge_training(plan, short)


def test_a_sample_that_nobody_trained_on_fails_the_run(plan: RunPlan) -> None:
    completion = complete(plan, 1, done(**PRODUCED), done(**TRAINED | {"samples": 8}), keys_left=1)
    assert len(completion.accounting.problems()) == 2


def test_the_report_lists_why_prompts_were_rejected(plan: RunPlan) -> None:
    state = plan.dir.attempt(1).state
    state.mkdir(parents=True)
    reasons = ["too long", "too long", "empty"]
    (state / "rejected.jsonl").write_text("".join(json.dumps({"reason": reason}) + "\n" for reason in reasons))
    completion = complete(plan, 1, done(**PRODUCED), done(**TRAINED), keys_left=0)
    assert completion.rejected_reasons == {"too long": 2, "empty": 1}


def test_a_torn_line_of_the_rejected_prompts_costs_no_run(plan: RunPlan) -> None:
    rejections(plan, "rejected", "refused")
    with (plan.dir.attempt(1).state / "rejected.jsonl").open("ab") as file:
        file.write(b'{"reason": "to\n\xff\n\n{"reason"')
    completion = complete(plan, 1, done(**PRODUCED), done(**TRAINED), keys_left=0)
    assert completion.rejected_reasons == {"why rejected": 1, "why refused": 1}
    assert completion.refused_reasons == {"why refused": 1}


def test_the_report_lists_why_samples_were_quarantined_by_the_word_of_the_last_attempt(plan: RunPlan) -> None:
    """Attempt 1 died before its checkpoint: what it gave up was met again by attempt 2, which could train on 3."""
    for attempt, given_up in ((1, {3: "not finite", 5: "torn"}), (2, {5: "hidden is not finite", 8: "lost"})):
        state = plan.dir.attempt(attempt).state
        state.mkdir(parents=True)
        lines = (json.dumps({"ordinal": number, "reason": why}) + "\n" for number, why in given_up.items())
        (state / "quarantined.jsonl").write_text("".join(lines))
    trained = done(**TRAINED | {"samples": 8, "quarantined": 1, "quarantined_ordinals": [[5, 5]]})
    completion = complete(plan, 2, done(**PRODUCED), trained, keys_left=0)
    assert completion.quarantined_reasons == {"hidden is not finite": 1}


def rejections(plan: RunPlan, *kinds: str) -> None:
    state = plan.dir.attempt(1).state
    state.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"reason": f"why {kind}", "kind": kind}) + "\n" for kind in kinds)
    (state / "rejected.jsonl").write_text("".join(lines))


def completed(plan: RunPlan, prompts: int, rejected: int, quarantined: int = 0) -> Completion:
    refs = prompts - rejected
    produced = done(prompts=prompts, refs=refs, rejected=rejected)
    trained = done(**TRAINED | {"samples": refs - quarantined, "quarantined": quarantined})
    return complete(plan, 1, produced, trained, keys_left=0)


def test_a_run_whose_target_refused_too_much_does_not_complete(plan: RunPlan) -> None:
    rejections(plan, *["quarantined"] * 3, *["refused"] * 3)
    with pytest.raises(TooManyLost, match=r"6 of 100 prompts .* rollout.max_rejected allows 5.0%: 3 x why") as lost:
        judge_training(plan, completed(plan, 100, 6))
    assert lost.value.failure_class == "infrastructure"
    judge_training(plan, completed(plan, 120, 6))


def test_prompts_of_a_form_that_cannot_be_used_do_not_count_against_the_target(plan: RunPlan) -> None:
    rejections(plan, *["rejected"] * 60, "refused")
    judge_training(plan, completed(plan, 100, 61))


def test_a_run_that_trained_on_too_little_of_what_was_captured_does_not_complete(plan: RunPlan) -> None:
    allowed = max(plan.spec.global_batch_size, 50)
    judge_training(plan, completed(plan, 1000, 0, quarantined=allowed))
    with pytest.raises(TooManyLost, match=r"training\.max_quarantined"):
        judge_training(plan, completed(plan, 1000, 0, quarantined=allowed + 1))


def figures(**changes: object) -> EvaluationFigures:
    sound = {
        "draft_tokens": 5,
        "prompts": 16,
        "accept_length_before": 1.0,
        "accept_length_after": 2.4,
        "interval_after": (2.2, 2.6),
        "per_position_after": [0.7, 0.4],
        "lossless": True,
    }
    return EvaluationFigures(**{**sound, **changes})


def test_a_draft_below_the_minimum_fails_the_run(plan: RunPlan) -> None:
    judge_draft(plan, figures())
    with pytest.raises(EvaluationFailed, match=r"1.900 is below evaluation.min_accept_length 2.0"):
        judge_draft(plan, figures(accept_length_after=1.9))
    with pytest.raises(EvaluationFailed, match="other tokens"):
        judge_draft(plan, figures(lossless=False))


def assignment(plan: RunPlan) -> RoleAssignment:
    return RoleAssignment(plan=plan, attempt=1, store=StoreEndpoints(master_address="a:1", metrics_address="a:2"))


def test_one_process_needs_no_agent_and_seven_need_torchrun(tmp_path: Path) -> None:
    assert launcher(assignment(a_plan(tmp_path, "training.processes=1")), 0) == []
    arguments = launcher(assignment(a_plan(tmp_path)), 0)
    assert "--nproc-per-node=7" in arguments
    assert "--standalone" in arguments


def test_the_nodes_of_a_consumer_meet_where_node_0_says(tmp_path: Path) -> None:
    plan = a_plan(tmp_path, "training.nodes=2", "rollout.high_watermark_refs=600")
    first = meet(assignment(plan), 0, 2)
    second = meet(assignment(plan), 1, 2)
    assert first[3] == second[3]
    assert (first[1], second[1]) == ("--node-rank=0", "--node-rank=1")
    assert "--rdzv-id=run-1" in first, "torchrun makes a folder of this name"


def test_a_missing_node_0_is_a_stall(tmp_path: Path) -> None:
    plan = a_plan(tmp_path, "orchestration.stall_timeout_s=0.01")
    with pytest.raises(RoleFailed, match="node 0 of the consumer did not start"):
        meet(assignment(plan), 1, 2)


def test_the_hooks_of_a_run_that_ended_badly_can_be_called_as_a_worker_calls_them() -> None:
    """A worker whose run was killed calls by keyword, the engine of a run that failed by position."""
    for hook in [*online_disagg_training.on_crashed_hooks, *online_disagg_training.on_cancellation_hooks]:
        inspect.signature(hook).bind(flow=online_disagg_training, flow_run=None, state=None)


def test_a_store_process_that_dies_stops_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is the watcher's, and its class is one that is tried again."""
    monkeypatch.setattr(roles, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(roles, "_STORE_POLL_S", 0.001)
    supervision = Supervision()
    looks = iter([None, None, StoreUnavailable("mooncake_master (pid 7) ended with killed by SIGKILL")])

    def require_store() -> None:
        if (error := next(looks)) is not None:
            raise error

    asyncio.run(watch_store(require_store, supervision))
    assert supervision.stop.is_set()
    assert (supervision.failure_class, supervision.reason) == (
        "store_lost",
        "mooncake_master (pid 7) ended with killed by SIGKILL",
    )


def test_the_report_sums_the_restarts_of_all_attempts(plan: RunPlan) -> None:
    record = RunRecord(plan, flow_run_id="f")
    for attempt, restarts in ((1, 2), (2, 1)):
        producer = role_run("producer", "Completed").model_copy(update={"restarts": restarts})
        record.attempt_ended(
            AttemptOutcome(attempt), {"producer": producer, "consumer": role_run("consumer", "Completed")}
        )
    report = record.failed(StoreUnavailable("gone"))
    assert {role: figures.restarts for role, figures in report.roles.items()} == {"producer": 3, "consumer": 0}


def test_a_process_that_goes_on_with_a_trained_run_reports_the_attempts_and_roles_before_it(plan: RunPlan) -> None:
    first = RunRecord(plan, flow_run_id="f", began=time.time() - 100)
    roles = {role: role_run(role, "Completed") for role in ("producer", "consumer")}
    first.attempt_ended(AttemptOutcome(1, "preempted", "killed by SIGKILL"), roles)
    first.attempt_ended(AttemptOutcome(2), roles)
    first.trained(complete(plan, 2, done(**PRODUCED), done(**TRAINED), keys_left=0))
    before = first.completed()
    assert [attempt.attempt for attempt in before.attempts] == [1, 2]
    assert set(before.roles) == {"producer", "consumer"}
    assert not first.asked
    first.ask()

    goes_on = RunRecord(plan, flow_run_id="f", began=time.time() - 10)
    assert goes_on.asked
    after = goes_on.completed()
    assert (after.attempts, after.roles) == (before.attempts, before.roles)
    assert after.seconds >= 110, "both processes worked"
