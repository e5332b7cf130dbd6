"""A process of the run, or of what it stands on, is stopped for half a minute and goes on."""

from __future__ import annotations

from contextlib import suppress

import psutil
import pytest

from tests.chaos.conftest import Start
from tests.chaos.kit import ChaosRun
from tests.chaos.platform import ChaosPlatform

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(1800)]

STOPPED_S = 30.0


def stopped(run: ChaosRun, process: psutil.Process, seconds: float = STOPPED_S) -> None:
    """Stop a process (SIGSTOP) in mid-training and let it go on."""
    run.disturb(process.suspend)
    try:
        run.wait_out(seconds)
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()


@pytest.mark.parametrize("role", ["producer", "consumer", "owner", "master"])
def test_a_role_is_stopped(start: Start, role: str) -> None:
    named = {"consumer": "trainer", "owner": "store's owner", "master": "store's master"}.get(role, role)
    run = start(f"SIGSTOP of the {named} for 30 s")
    run.train_until(step=6)
    stopped(run, run.process(role))
    run.completes()


def test_a_rank_of_two_is_stopped(start: Start) -> None:
    run = start("SIGSTOP of rank 1 of two for 30 s", "training.processes=2", "training.accumulation_steps=1")
    run.train_until(step=6)
    stopped(run, run.process("consumer", rank=1))
    run.completes()


@pytest.mark.parametrize("role", ["producer", "consumer"])
def test_the_flow_run_of_a_role_is_stopped(start: Start, role: str) -> None:
    run = start(f"SIGSTOP of the {role}'s flow run for 30 s")
    run.train_until(step=6)
    stopped(run, run.watcher(role))
    run.completes()


def test_the_parent_is_stopped(start: Start) -> None:
    run = start("SIGSTOP of the parent for 30 s")
    run.train_until(step=6)
    stopped(run, run.parent())
    run.completes()


def test_the_worker_of_the_pools_is_stopped(start: Start, shared: ChaosPlatform) -> None:
    run = start("SIGSTOP of the pools' worker for 30 s")
    run.train_until(step=6)
    stopped(run, shared.workers())
    run.completes()


@pytest.mark.parametrize("seconds", [30, 100])
def test_the_prefect_server_is_stopped(start: Start, shared: ChaosPlatform, seconds: int) -> None:
    run: ChaosRun = start(f"SIGSTOP of the Prefect server for {seconds} s")
    run.train_until(step=6)
    stopped(run, shared.server(), seconds)
    run.completes()
