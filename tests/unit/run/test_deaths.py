"""A process that left no word: what its exit, its agent's log and the kernel's counts say of its end."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from disagg_core.errors import StoreKilled, StoreUnavailable
from disagg_core.processes.memory_kills import RECENT_S, MemoryKills
from disagg_core.run.deaths import cause_of_death
from disagg_core.store.services import ServiceProcess

pytestmark = pytest.mark.unit


class Machine:
    """A ``/proc`` and a memory cgroup of either version, as the kernel shows them."""

    def __init__(self, root: Path, version: int) -> None:
        self.proc = root / "proc"
        self.group = root / "cgroup" / "job" / "step"
        self.version = version
        (self.proc / "self").mkdir(parents=True)
        self.group.mkdir(parents=True)
        controllers, kind, options = ("", "cgroup2", "rw") if version == 2 else ("memory", "cgroup", "rw,memory")
        (self.proc / "self" / "cgroup").write_text(f"{0 if version == 2 else 4}:{controllers}:/job/step\n")
        mount = f"31 23 0:28 / {root / 'cgroup'} rw - {kind} {kind} {options}\n"
        (self.proc / "self" / "mountinfo").write_text(f"30 1 0:1 / / rw - ext4 /dev/sda rw\n{mount}")
        limit = "memory.max" if version == 2 else "memory.limit_in_bytes"
        (self.group / limit).write_text("max\n" if version == 2 else str(0x7FFFFFFFFFFFF000))
        (self.group.parent / limit).write_text(f"{3 * 2**30}\n")
        self.kill(0)

    def kill(self, count: int) -> None:
        if self.version == 2:
            (self.group / "memory.events").write_text(f"low 0\nmax 7\noom 1\noom_kill {count}\noom_group_kill 0\n")
        else:
            (self.group / "memory.oom_control").write_text(f"oom_kill_disable 0\nunder_oom 0\noom_kill {count}\n")


@pytest.fixture(params=[1, 2], ids=["cgroup1", "cgroup2"])
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Machine:
    return Machine(tmp_path, request.param)


def test_a_kernels_kill_for_memory_is_out_of_memory_with_the_limit_and_advice(machine: Machine) -> None:
    memory = MemoryKills(machine.proc)
    machine.kill(1)
    failure_class, why = cause_of_death(-signal.SIGKILL, Path("none"), since=0, memory=memory)
    assert failure_class == "out_of_memory"
    assert f"{3 * 2**30} bytes (3.00 GiB)" in why, "the limit of the job above counts"
    assert "rollout.batch_tokens" in why


def test_a_store_owner_that_the_kernel_killed_for_memory_is_no_lost_store(machine: Machine, tmp_path: Path) -> None:
    memory = MemoryKills(machine.proc)
    owner = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    service = ServiceProcess("store owner 0", owner, tmp_path / "owner.log")
    service.require_alive(memory)
    owner.kill()
    owner.wait()
    with pytest.raises(StoreUnavailable, match=r"store owner 0 .* killed by SIGKILL"):
        service.require_alive(memory)
    machine.kill(1)
    with pytest.raises(StoreKilled, match=r"the kernel killed 1 .*\(3\.00 GiB\); lower store\.capacity") as killed:
        service.require_alive(memory)
    assert killed.value.failure_class == "out_of_memory"


def test_a_kill_for_memory_of_long_ago_does_not_explain_this_death(machine: Machine) -> None:
    now = 0.0
    memory = MemoryKills(machine.proc, clock=lambda: now)
    machine.kill(1)
    for _ in range(5):
        now += RECENT_S / 2
        memory.look()
    assert memory.recent() is None
    assert cause_of_death(-signal.SIGKILL, Path("none"), since=0, memory=memory)[0] == "preempted"


def test_without_a_group_of_its_own_the_machines_count_is_read(tmp_path: Path) -> None:
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/\n")
    (proc / "self" / "mountinfo").write_text("")
    (proc / "vmstat").write_text("pgfault 9\noom_kill 3\n")
    memory = MemoryKills(proc)
    assert memory.recent() is None
    (proc / "vmstat").write_text("pgfault 9\noom_kill 4\n")
    assert memory.recent() == "the kernel killed 1 process(es) of this machine for memory"


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGKILL, "preempted"),
        (signal.SIGTERM, "preempted"),
        (signal.SIGHUP, "preempted"),
        (signal.SIGSEGV, "bug"),
        (signal.SIGBUS, "bug"),
        (signal.SIGABRT, "bug"),
    ],
)
def test_only_a_signal_from_outside_is_a_preemption(machine: Machine, number: signal.Signals, expected: str) -> None:
    found, why = cause_of_death(-number, Path("none"), since=0, memory=MemoryKills(machine.proc))
    assert (found, why) == (expected, f"killed by {number.name}")


@pytest.mark.parametrize(("end", "expected"), [("os.kill(os.getpid(), 9)", "preempted"), ("sys.exit(3)", "bug")])
def test_an_agent_that_exits_with_1_is_asked_how_its_rank_ended(tmp_path: Path, end: str, expected: str) -> None:
    rank = tmp_path / "rank.py"
    rank.write_text(f"import os, sys, time\nif os.environ['RANK'] == '0':\n    {end}\ntime.sleep(60)\n")
    log = tmp_path / "consumer.log"
    log.write_text("of an earlier process: failed (exitcode: -11) local_rank: 0\n")
    since = log.stat().st_size
    with log.open("ab") as output:
        agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(rank)]
        code = subprocess.run(agent, stdout=output, stderr=output, timeout=120).returncode
    assert code == 1
    memory = MemoryKills(Machine(tmp_path / "machine", 2).proc)
    assert cause_of_death(code, log, since=since, memory=memory)[0] == expected


def test_an_exit_without_any_word_is_a_bug(machine: Machine, tmp_path: Path) -> None:
    assert cause_of_death(1, tmp_path / "none", since=0, memory=MemoryKills(machine.proc)) == ("bug", "exit code 1")
