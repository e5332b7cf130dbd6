"""A role's exit code is its outcome, also where it leaves a thread behind inside torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from disagg_core.run.outcomes import PREEMPTED_EXIT_CODE

pytestmark = pytest.mark.unit

LEFT_BEHIND = """
import sys, threading, torch
from disagg_core.errors import BadInput, Preempted
from disagg_core.run.outcomes import exit_with
torch.set_num_threads(1)
inside = threading.Event()
def compute():
    matrix = torch.rand(300, 300)
    while True:
        matrix @ matrix
        inside.set()
threading.Thread(target=compute, daemon=True).start()
inside.wait()
def role():
    print("the role's last word", end="")
    {end}
exit_with(role)
"""


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("return", 0),
        ("raise Preempted('asked to stop')", PREEMPTED_EXIT_CODE),
        ("raise BadInput('no')", 1),
        ("raise ZeroDivisionError('a bug')", 1),
    ],
)
def test_a_thread_that_was_left_behind_inside_torch_does_not_abort_the_process(end: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEFT_BEHIND.format(end=end)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (code, "the role's last word"), done.stderr
    assert ("ZeroDivisionError: a bug" in done.stderr) == ("a bug" in end)
