"""A process of the run, or of what it stands on, is killed in mid-training."""

from __future__ import annotations

import pytest

from tests.chaos.conftest import Start
from tests.chaos.platform import ChaosPlatform

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_the_producer_is_killed(start: Start) -> None:
    run = start("SIGKILL of the producer")
    run.train_until(step=6)
    run.disturb(run.process("producer").kill)
    run.detects_end_of_a_role()
    run.completes(restarts=1)


def test_the_trainer_is_killed(start: Start) -> None:
    run = start("SIGKILL of the trainer")
    run.train_until(step=6)
    run.disturb(run.process("consumer").kill)
    run.detects_end_of_a_role()
    run.completes(["preempted", "finished"])


@pytest.mark.parametrize(("rank", "failure_class"), [(0, "preempted"), (1, "infrastructure")])
def test_a_rank_of_two_is_killed(start: Start, rank: int, failure_class: str) -> None:
    run = start(f"SIGKILL of rank {rank} of two", "training.processes=2", "training.accumulation_steps=1")
    run.train_until(step=6)
    run.disturb(run.process("consumer", rank=rank).kill)
    run.detects_end_of_a_role()
    run.completes([failure_class, "finished"])


@pytest.mark.parametrize("service", ["owner", "master"])
def test_a_process_of_the_store_is_killed(start: Start, service: str) -> None:
    run = start(f"SIGKILL of the store's {service}")
    run.train_until(step=6)
    run.disturb(run.process(service).kill)
    run.detects_end_of_a_role()
    run.completes(["store_lost", "finished"])


def test_the_worker_of_the_pools_is_killed(start: Start, shared: ChaosPlatform) -> None:
    run = start("SIGKILL of the pools' worker", "evaluation.prompts=2")
    run.train_until(step=6)
    killed = shared.workers()
    run.disturb(killed.kill)
    run.detects(lambda: shared.workers_other_than(killed), "the workers are started again")
    run.completes()


def test_the_parent_is_killed_and_one_command_resumes(start: Start, shared: ChaosPlatform) -> None:
    run = start("SIGKILL of the parent, then `prefect flow-run retry`")
    run.train_until(step=6)
    run.disturb(run.parent().kill)
    run.detects(lambda: run.state() == "CRASHED", "the run is crashed")
    run.await_cleared()
    shared.prefect("flow-run", "retry", run.id)
    run.completes()


def test_a_server_of_the_target_is_killed(start: Start) -> None:
    patient = ("target.backend=sglang", "orchestration.stall_timeout_s=900", "channel.idle_timeout_s=900")
    run = start("SIGKILL of the only SGLang server", *patient)
    run.train_until(step=6, within_s=600)
    server = run.process("server")
    run.disturb(server.kill)
    run.detects_in_log("killed by SIGKILL")
    run.completes(within_s=900)
