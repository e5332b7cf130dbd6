"""A trainer that gets nowhere: it shows where it hangs, says `stalled`, and is gone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from disagg_core.run.attempts import RETRIED
from disagg_core.training.watchdog import Watch

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]

HANGING = """
import sys, threading
from pathlib import Path
from disagg_core.run.outcomes import write_failure
from disagg_core.training.watchdog import Watchdog

def inside_a_collective():
    threading.Event().wait()

def say(error):
    write_failure(Path(sys.argv[1]), 0.0, error)

with Watchdog("rank 1", 0.5, on_stall=say, look_s=0.05, last_words_s=0.1) as watchdog:
    for step in range(3):
        watchdog.note(f"trained step {step}")
    inside_a_collective()
"""


def test_progress_of_any_kind_keeps_the_watch_content() -> None:
    now = 0.0
    watch = Watch(60.0, clock=lambda: now)
    for _ in range(10):
        now += 59
        assert watch.overdue() is None
        watch.note("saved a checkpoint")
    now += 61
    failure = watch.overdue()
    assert failure is not None
    assert failure.failure_class in RETRIED
    assert "61 s" in str(failure)
    assert "saved a checkpoint" in str(failure)


def test_a_rank_that_hangs_leaves_its_stacks_and_its_class_and_exits(tmp_path: Path) -> None:
    told = tmp_path / "outcome.json"
    done = subprocess.run(
        [sys.executable, "-c", HANGING, str(told)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "inside_a_collective" in done.stderr, "the stack of the thread that hangs"
    outcome = told.read_text()
    assert '"failure_class": "stalled"' in outcome
    assert "trained step 2" in outcome
