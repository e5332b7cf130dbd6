"""Master and owners: started, found ready, watched, and gone when they should be."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from disagg_core.cli.store import app
from disagg_core.contracts import RunIdentity
from disagg_core.errors import BadInput, MissingLibrary, PortTaken, StoreTooLarge, StoreUnavailable
from disagg_core.store import MooncakeFeatureStore, managed_store, probe_store, require_mooncake, running_store
from disagg_core.store import owner as owner_module
from disagg_core.store.capacity import available_bytes
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.store.library import ENVIRONMENT
from disagg_core.store.master import MasterView
from tests.kit.waiting import eventually
from tests.ports import free_port

pytestmark = pytest.mark.integration

MIB = 1 << 20


def test_a_store_of_two_owners_is_ready_bound_to_loopback_and_leaves_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    with running_store(64 * MIB, log_dir=tmp_path, owners=2, progress=said.append) as services:
        health = probe_store(services.endpoints, min_capacity=64 * MIB)
        assert health.total_bytes == 64 * MIB
        assert len(MasterView(services.endpoints).segments()) == 2
        processes = [psutil.Process(service.process.pid) for service in (services.master, *services.owners)]
        listening = [c.laddr for c in processes[0].net_connections() if c.status == psutil.CONN_LISTEN]
        assert len(listening) == 2
        assert {address.ip for address in listening} == {"127.0.0.1"}
        for process, service in zip(processes, (services.master, *services.owners), strict=True):
            assert Path(f"/proc/{process.pid}/fd/1").readlink() == service.log_file
            assert Path(f"/proc/{process.pid}/fd/2").readlink() == service.log_file
            assert os.getsid(process.pid) == process.pid
        services.require_alive()
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
    assert sorted(path.name for path in tmp_path.glob("*.log")) == [
        "mooncake-master.log", "mooncake-owner-0.log", "mooncake-owner-1.log",
    ]  # fmt: skip


def test_an_error_inside_the_block_leaves_nothing_either(tmp_path: Path) -> None:
    with pytest.raises(KeyError), running_store(16 * MIB, log_dir=tmp_path) as services:
        raise KeyError
    assert services.master.process.poll() is not None
    assert services.owners[0].process.poll() is not None


def test_a_store_started_by_a_thread_that_ends_lives_on(tmp_path: Path) -> None:
    manager = running_store(16 * MIB, log_dir=tmp_path)
    entered = []
    starter = threading.Thread(target=lambda: entered.append(manager.__enter__()))
    starter.start()
    starter.join()
    try:
        probe_store(entered[0].endpoints)
        entered[0].require_alive()
    finally:
        manager.__exit__(None, None, None)


def test_everything_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
import threading
from disagg_core.store import running_store
with running_store({16 * MIB}, log_dir=Path({str(tmp_path)!r})) as services:
    print(services.master.process.pid, services.owners[0].process.pid, flush=True)
    threading.Event().wait()
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(children) == 2
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    eventually(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))


@pytest.mark.parametrize("which", ["master_port", "metrics_port"])
def test_a_port_in_use_is_named(tmp_path: Path, which: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTaken, match=str(port)), managed_store(16 * MIB, log_dir=tmp_path, **{which: port}):
            pass
    assert not list(tmp_path.glob("*.log"))


def test_a_given_port_is_used(tmp_path: Path) -> None:
    port = free_port()
    with managed_store(16 * MIB, log_dir=tmp_path, master_port=port) as endpoints:
        assert endpoints.master_address == f"127.0.0.1:{port}"


def test_a_capacity_that_does_not_fit_the_machine_is_refused_before_anything_starts(tmp_path: Path) -> None:
    wanted = 10 * available_bytes()
    with (
        pytest.raises(StoreTooLarge, match=f"{wanted} bytes.*set store.capacity"),
        managed_store(wanted, log_dir=tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"capacity": 0}, {"owners": 0}, {"host": "0.0.0.0"}], ids=lambda o: next(iter(o)))
def test_options_out_of_range_are_named(tmp_path: Path, options: dict[str, object]) -> None:
    given = {"capacity": 16 * MIB, "log_dir": tmp_path, **options}
    with pytest.raises(BadInput, match=next(iter(options))), managed_store(**given):
        pass


def test_a_dead_owner_is_noticed_with_the_end_of_its_log(tmp_path: Path) -> None:
    with running_store(16 * MIB, log_dir=tmp_path) as services:
        services.owners[0].process.kill()
        eventually(lambda: services.owners[0].process.poll() is not None)
        with pytest.raises(StoreUnavailable, match=r"(?s)store owner 0.*killed by SIGKILL.*mooncake-owner-0.log"):
            services.require_alive()


def test_an_owner_that_cannot_start_says_why(tmp_path: Path, endpoints: StoreEndpoints) -> None:
    status = tmp_path / "status.json"
    wanted = 10 * available_bytes()
    arguments = ["--master", endpoints.master_address, "--capacity", str(wanted), "--status", str(status)]
    done = subprocess.run(
        [sys.executable, "-m", "disagg_core.store.owner", *arguments], timeout=60, capture_output=True
    )
    assert done.returncode == 1
    said = owner_module.read_status(status)
    assert said is not None
    assert said.state == "failed"
    assert str(wanted) in said.error


def test_an_owner_started_by_hand_adds_its_memory_and_takes_it_away(tmp_path: Path) -> None:
    with managed_store(16 * MIB, log_dir=tmp_path) as endpoints:
        arguments = ["--master", endpoints.master_address, "--capacity", "32MiB", "--status", str(tmp_path / "s.json")]
        owner = subprocess.Popen(
            [sys.executable, "-m", "disagg_core.store.owner", *arguments],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            eventually(lambda: probe_store(endpoints).total_bytes == 48 * MIB)
            eventually(lambda: owner_module.read_status(tmp_path / "s.json") is not None)
        finally:
            owner.terminate()
            assert owner.wait(60) == 0
        eventually(lambda: probe_store(endpoints).total_bytes == 16 * MIB)


def test_an_external_store_is_probed(endpoints: StoreEndpoints) -> None:
    health = probe_store(endpoints, min_capacity=MIB)
    assert health.total_bytes == 128 * MIB
    with pytest.raises(StoreTooLarge, match=f"{128 * MIB} bytes, {1 << 40} are asked for"):
        probe_store(endpoints, min_capacity=1 << 40)
    gone = endpoints.model_copy(update={"master_address": "127.0.0.1:1"})
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1:1"):
        probe_store(gone, timeout_s=0.2)


def test_status_shows_capacity_use_runs_and_evictions(
    store: MooncakeFeatureStore, identity: RunIdentity, endpoints: StoreEndpoints, run_id: str
) -> None:
    import torch

    ref = store.put("s1", {"x": torch.ones(3)}, identity=identity, source_task_id="t", num_tokens=1)
    options = ["status", "--master", endpoints.master_address, "--metrics", endpoints.metrics_address]
    shown = CliRunner().invoke(app, options, env={"COLUMNS": "160"})
    assert shown.exit_code == 0
    for part in ("128 MiB", f"{run_id}/1", "nothing evicted", "1 owners"):
        assert part in shown.output
    store.release(ref)


def test_status_of_a_store_that_is_not_there_is_one_line_and_2() -> None:
    shown = CliRunner().invoke(app, ["status", "--master", "127.0.0.1:1", "--metrics", "127.0.0.1:1"])
    assert shown.exit_code == 2
    assert len(shown.output.strip().splitlines()) == 1
    assert "127.0.0.1:1" in shown.output


def test_mooncake_loads_with_its_environment() -> None:
    require_mooncake()
    assert set(ENVIRONMENT) <= set(os.environ)


@pytest.mark.parametrize(
    ("package", "complaint"),
    [
        ({}, "pip install"),
        ({"__init__.py": "", "store.py": "raise ImportError('libx.so.1: cannot open')"}, "libx.so.1"),
    ],
    ids=["no wheel", "no system library"],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    tmp_path: Path, package: dict[str, str], complaint: str
) -> None:
    (tmp_path / "mooncake").mkdir()
    for name, text in package.items():
        (tmp_path / "mooncake" / name).write_text(text)
    block = "" if package else "sys.modules['mooncake'] = None; sys.modules['mooncake.store'] = None"
    script = f"import sys; {block}\nfrom disagg_core.store import require_mooncake\nrequire_mooncake()"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(owner_module.__file__).parents[2]}"}
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert MissingLibrary.__name__ in done.stderr
    assert complaint in done.stderr
    assert "install" in done.stderr
