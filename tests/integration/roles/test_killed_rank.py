"""Two ranks, one of which is gone: what the other makes of the broken connection."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from disagg_core.run.attempts import AttemptLoop
from disagg_core.run.outcomes import read_outcome
from tasks.roles import judge
from tests.ports import free_port
from tests.unit.flows.test_decisions import role_run

pytestmark = pytest.mark.integration

CHILD = Path(__file__).with_name("killed_rank.py")


@pytest.mark.parametrize(("end", "expected"), [("killed", "infrastructure"), ("raised", "bug")])
def test_a_rank_that_is_gone_without_a_note_is_infrastructure_and_the_run_goes_on(
    tmp_path: Path, end: str, expected: str
) -> None:
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(CHILD.parents[3]),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(CHILD), str(tmp_path), end],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    for process in ranks:
        process.wait(120)
    outcome = read_outcome(tmp_path / "consumer-outcome.json")
    assert outcome is not None
    assert outcome.failure_class == expected, outcome.message
    loop = AttemptLoop(limit=3)
    loop.record(judge(1, role_run("producer", "Cancelled"), role_run("consumer", "Failed", outcome)))
    assert loop.next() == 2
