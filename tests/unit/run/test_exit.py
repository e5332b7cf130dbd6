"""A role's exit code is its outcome, also where it leaves a thread behind inside torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from disagg_core.run.outcomes import PREEMPTED_EXIT_CODE

pytestmark = pytest.mark.unit

ENDS = {
    "return": 0,
    "raise Preempted('asked to stop')": PREEMPTED_EXIT_CODE,
    "raise BadInput('no')": 1,
    "raise ZeroDivisionError('a bug')": 1,
}
LEFT_BEHIND = """
import json, os, sys, threading, torch
from disagg_core.errors import BadInput, Preempted
from disagg_core.run.outcomes import exit_with
torch.set_num_threads(1)

def play(end):
    inside = threading.Event()
    def compute():
        matrix = torch.rand(300, 300)
        while True:
            matrix @ matrix
            inside.set()
    def role():
        print("the role's last word", end="")
        if end != "return":
            exec(end)
    threading.Thread(target=compute, daemon=True).start()
    inside.wait()
    exit_with(role)

codes = []
for number, end in enumerate(json.loads(sys.argv[1])):
    process = os.fork()
    if not process:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{sys.argv[2]}/{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        play(end)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
print(json.dumps(codes))
"""
"""Each role in a process of its own, forked from one that has imported torch and uses it nowhere."""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Exit code, output and errors of a process for each end of a role."""
    place = tmp_path_factory.mktemp("roles")
    command = [sys.executable, "-c", LEFT_BEHIND, json.dumps(list(ENDS)), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    return {end: (codes[n], *_said(place / f"{n}.out", place / f"{n}.err")) for n, end in enumerate(ENDS)}


def _said(*files: Path) -> tuple[str, ...]:
    return tuple(file.read_text() for file in files)


@pytest.mark.parametrize(("end", "code"), ENDS.items())
def test_a_thread_that_was_left_behind_inside_torch_does_not_abort_the_process(
    ended: dict[str, tuple[int, str, str]], end: str, code: int
) -> None:
    found, output, errors = ended[end]
    assert (found, output) == (code, "the role's last word"), errors
    assert ("ZeroDivisionError: a bug" in errors) == ("a bug" in end)
