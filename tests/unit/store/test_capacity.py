"""A store's memory is compared with what the machine has, and with what every cgroup around the process allows."""

from pathlib import Path

import pytest

from disagg_core.errors import BadInput, StoreTooLarge
from disagg_core.store.capacity import available_bytes, check_capacity

pytestmark = pytest.mark.unit

MIB = 1 << 20
ENDLESS = "9223372036854771712"


class Machine:
    """The files from which a process learns of its cgroups, below `root`."""

    def __init__(self, root: Path) -> None:
        self.process = root / "proc"
        self.process.mkdir()
        self.mounts: list[str] = []
        self.groups: list[str] = []
        self.root = root

    def mount(self, kind: str, options: str = "rw", root: str = "/") -> Path:
        point = self.root / f"mount-{len(self.mounts)}"
        self.mounts.append(f"3{len(self.mounts)} 25 0:30 {root} {point} rw,nosuid shared:9 - {kind} cgroup {options}")
        (self.process / "mountinfo").write_text("\n".join(["24 1 8:1 / / rw - ext4 /dev/root rw", *self.mounts]) + "\n")
        return point

    def member_of(self, line: str) -> None:
        self.groups.append(line)
        (self.process / "cgroup").write_text("\n".join(self.groups) + "\n")

    def available(self) -> int:
        return available_bytes(self.process)


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("memory_", "memory.", 1)).write_text(f"{content}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_tightest_limit_above_a_slurm_step_counts(machine: Machine) -> None:
    root = machine.mount("cgroup2")
    job = root / "system.slice" / "slurmstepd.scope" / "job_7"
    machine.member_of("0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0")
    group(job / "step_0" / "user" / "task_0", memory_max="max", memory_current=9 * MIB)
    group(job / "step_0" / "user", memory_max="max", memory_current=9 * MIB)
    group(job / "step_0", memory_max=900 * MIB, memory_current=9 * MIB)
    group(job, memory_max=100 * MIB, memory_current=30 * MIB)
    group(root / "system.slice", memory_max=800 * MIB, memory_current=40 * MIB)
    assert machine.available() == 70 * MIB


def test_a_systemd_scope_with_a_soft_limit_counts_and_its_neighbours_do_not(machine: Machine) -> None:
    root = machine.mount("cgroup2")
    machine.member_of("0::/user.slice/run-1.scope")
    group(root / "user.slice" / "run-1.scope", memory_max=90 * MIB, memory_high=50 * MIB, memory_current=10 * MIB)
    group(root / "user.slice" / "run-2.scope", memory_max=1 * MIB, memory_current=1 * MIB)
    assert machine.available() == 40 * MIB


def test_the_first_version_of_cgroups_is_read_where_it_manages_memory(machine: Machine) -> None:
    machine.mount("cgroup", "rw,cpu,cpuacct")
    root = machine.mount("cgroup", "rw,memory")
    machine.mount("cgroup2")
    machine.member_of("4:memory:/slurm/uid_0/job_1/step_0")
    machine.member_of("3:cpu,cpuacct:/slurm/uid_0")
    machine.member_of("0::/")
    group(root, memory_limit_in_bytes=ENDLESS, memory_usage_in_bytes=500 * MIB)
    job = root / "slurm" / "uid_0" / "job_1"
    group(job, memory_limit_in_bytes=64 * MIB, memory_usage_in_bytes=4 * MIB)
    group(job / "step_0", memory_limit_in_bytes=ENDLESS, memory_usage_in_bytes=4 * MIB)
    assert machine.available() == 60 * MIB


@pytest.mark.parametrize("line", ["0::/", "0::/docker/abc", "0::/../other"], ids=["own names", "host names", "outside"])
def test_a_container_sees_its_limit_at_the_root_of_its_mount(machine: Machine, line: str) -> None:
    root = machine.mount("cgroup2", root="/docker/abc" if "docker" in line else "/")
    machine.member_of(line)
    group(root, memory_max=32 * MIB, memory_current=2 * MIB)
    assert machine.available() == 30 * MIB


def test_a_group_inside_a_containers_mount_is_found(machine: Machine) -> None:
    root = machine.mount("cgroup2", root="/docker/abc")
    machine.member_of("0::/docker/abc/service")
    group(root, memory_max=320 * MIB, memory_current=2 * MIB)
    group(root / "service", memory_max=32 * MIB, memory_current=2 * MIB)
    assert machine.available() == 30 * MIB


def test_file_cache_that_nobody_uses_counts_as_room(machine: Machine) -> None:
    root = machine.mount("cgroup2")
    machine.member_of("0::/job")
    stat = f"anon {MIB}\nactive_file 7\ninactive_file {60 * MIB}"
    group(root / "job", memory_max=100 * MIB, memory_current=99 * MIB, memory_stat=stat)
    assert machine.available() == 61 * MIB


def test_without_limits_it_is_the_machines_memory(machine: Machine) -> None:
    assert machine.available() > MIB
    root = machine.mount("cgroup2")
    machine.member_of("0::/job")
    group(root / "job", memory_max="max", memory_current=MIB)
    assert machine.available() > MIB


def test_a_group_that_is_over_its_limit_has_no_room(machine: Machine) -> None:
    root = machine.mount("cgroup2")
    machine.member_of("0::/job")
    group(root / "job", memory_max=MIB, memory_high=MIB, memory_current=2 * MIB)
    assert machine.available() == 0


def test_a_capacity_is_compared_with_the_machine() -> None:
    check_capacity(1)
    with pytest.raises(StoreTooLarge, match="has room for"):
        check_capacity(2 * available_bytes())
    with pytest.raises(BadInput, match="found -5"):
        check_capacity(-5)
