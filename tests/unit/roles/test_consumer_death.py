"""A rank of the trainer ends with torchrun, however that ends: it has a session of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from disagg_core.processes.retry import wait_until
from disagg_core.processes.tree import lives

pytestmark = pytest.mark.unit

AGENT = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-m", "disagg_core.roles.consumer", sys.argv[1]], start_new_session=True)
print(rank.pid, flush=True)
time.sleep(300)
"""


def test_a_rank_ends_when_its_agent_is_killed(tmp_path: Path) -> None:
    assignment = tmp_path / "assignment.json"
    os.mkfifo(assignment)  # the rank waits at it, as in any wait of which it cannot be called
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, str(assignment)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "LOCAL_RANK": "0"},
        cwd=Path(__file__).parents[3],
    )
    assert agent.stdout is not None
    rank = psutil.Process(int(agent.stdout.readline()))

    def reading() -> int | None:
        try:
            return os.open(assignment, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return None

    try:
        opened = wait_until(reading, timeout_s=120, every_s=0.05)
        assert opened is not None
        agent.kill()
        agent.wait()
        agent.stdout.close()
        wait_until(lambda: not lives(rank), timeout_s=60, every_s=0.05)
        assert not lives(rank)
        os.close(opened)
    finally:
        agent.kill()
        if lives(rank):
            rank.kill()
