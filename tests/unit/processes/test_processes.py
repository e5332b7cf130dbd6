"""Process trees end when they are told to, and when we do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from disagg_core.errors import PortTaken
from disagg_core.processes.tree import check_port, describe_exit, free_port, lives, spawn, stop_tree, tail
from tests.kit.waiting import eventually

pytestmark = pytest.mark.unit

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def test_output_goes_to_the_log_and_not_to_us(tmp_path: Path) -> None:
    process = spawn([sys.executable, "-c", "print('said')"], tmp_path / "logs" / "x.log")
    assert process.wait(60) == 0
    assert tail(tmp_path / "logs" / "x.log") == "said"


def test_one_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}]); exec({STUBBORN!r})"
    process = spawn([sys.executable, "-c", code], tmp_path / "log")
    eventually(lambda: tail(tmp_path / "log").count("up") == 2)
    children = psutil.Process(process.pid).children()
    assert describe_exit(stop_tree(process, grace_s=0.2)) == "killed by SIGKILL"
    eventually(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))


IN_A_SESSION_OF_ITS_OWN = (
    f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], start_new_session=True); "
)
"""As torchrun starts its ranks."""


def test_what_has_a_session_of_its_own_ends_with_the_tree(tmp_path: Path) -> None:
    process = spawn([sys.executable, "-c", IN_A_SESSION_OF_ITS_OWN + "time.sleep(60)"], tmp_path / "log")
    eventually(lambda: tail(tmp_path / "log") == "up")
    (rank,) = psutil.Process(process.pid).children()
    stop_tree(process, grace_s=0.2)
    assert not lives(rank)


def test_what_was_left_behind_by_a_leader_that_died_ends_with_the_tree(tmp_path: Path) -> None:
    process = spawn([sys.executable, "-c", IN_A_SESSION_OF_ITS_OWN + "time.sleep(60)"], tmp_path / "log")
    eventually(lambda: tail(tmp_path / "log") == "up")
    (rank,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert lives(rank)
    stop_tree(process, grace_s=0.2)
    assert not lives(rank)


def test_a_tree_inside_a_tree_ends_with_the_outer_one_and_not_the_other_way_round(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from disagg_core.processes.tree import spawn\n"
        f"spawn([sys.executable, '-c', {IN_A_SESSION_OF_ITS_OWN + 'time.sleep(60)'!r}], "
        f"Path({str(tmp_path / 'inner')!r}), death_signal=0)\n"
        "time.sleep(60)"
    )
    outer = spawn([sys.executable, "-c", code], tmp_path / "outer")
    eventually(lambda: tail(tmp_path / "inner") == "up")
    everything = psutil.Process(outer.pid).children(recursive=True)
    other = spawn([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "other")
    outer.kill()
    outer.wait()
    stop_tree(outer, grace_s=0.2)
    assert not any(lives(process) for process in everything)
    assert other.poll() is None
    stop_tree(other, grace_s=5)


def test_one_that_is_paused_hears_sigterm_all_the_same(tmp_path: Path) -> None:
    code = "import time; print('up', flush=True); time.sleep(60)"
    process = spawn([sys.executable, "-c", code], tmp_path / "log")
    eventually(lambda: tail(tmp_path / "log") == "up")
    process.send_signal(signal.SIGSTOP)
    assert describe_exit(stop_tree(process, grace_s=30)) == "killed by SIGTERM"


def test_a_child_dies_with_its_parent_also_when_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from disagg_core.processes.tree import spawn\n"
        f"child = spawn([sys.executable, '-c', 'import time; time.sleep(60)'], Path({str(tmp_path / 'log')!r}))\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    eventually(lambda: not child.is_running() or child.status() == "zombie")


def test_a_taken_port_is_named() -> None:
    port = free_port("127.0.0.1")
    check_port("127.0.0.1", port, "Prefect server")
    with socket.socket() as somebody:
        somebody.bind(("127.0.0.1", port))
        somebody.listen()
        with pytest.raises(PortTaken, match=f"Prefect server: port {port} on 127.0.0.1 is taken"):
            check_port("127.0.0.1", port, "Prefect server")
