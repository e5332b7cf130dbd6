"""Disk, mount and shell of a run are not what they should be."""

from __future__ import annotations

import hashlib
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.chaos.conftest import Start
from tests.chaos.kit import ChaosRun
from tests.chaos.platform import platform_in

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(1800)]

AWAY_S = 20.0
SMALL = 16 << 20
"""Bytes of a disk that holds the run's three checkpoints and the one that is written, and little more."""


@contextmanager
def mounted(where: Path, *, size: int = SMALL) -> Iterator[None]:
    """Mount a small file system of its own at `where`, over what is there."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(where)], check=True)


def channel_of(run: ChaosRun) -> Path:
    return run.dir.attempt(1).channel


def test_the_channel_is_not_there(start: Start) -> None:
    run = start("channel directory moved away for 20 s")
    run.train_until(step=6)
    aside = channel_of(run).with_name("aside")
    run.disturb(lambda: channel_of(run).rename(aside))
    run.detects_that_the_channel_is_away()
    run.wait_out(AWAY_S)
    aside.rename(channel_of(run))
    run.completes()


def test_the_channel_is_hidden_by_another_mount(start: Start) -> None:
    run = start("channel directory empty for 20 s, as when its mount is lost")
    run.train_until(step=6)

    with ExitStack() as mounts:
        run.disturb(lambda: mounts.enter_context(mounted(channel_of(run))))
        run.detects_that_the_channel_is_away()
        run.wait_out(AWAY_S)
    run.completes()


def test_the_disk_is_full_when_a_checkpoint_is_saved(start: Start) -> None:
    run = start("disk full while a checkpoint is saved", delay_s=3.0)
    run.dir.checkpoints.mkdir(parents=True)
    with mounted(run.dir.checkpoints):
        run.train_until(step=6)
        ballast = run.dir.checkpoints / "ballast"
        run.disturb(lambda: fill(ballast))
        run.detects_end_of_a_role()
        ballast.unlink()
        run.completes(["infrastructure", "finished"])
        assert not list(run.dir.checkpoints.glob(".*"))


def fill(ballast: Path) -> None:
    """Take all but a few kilobytes of the disk that `ballast` is on."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def test_the_shell_has_a_dead_proxy_and_another_prefect_s_database(start: Start, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as database:
        database.execute("create table theirs (id integer)")
    before = hashlib.sha256(foreign.read_bytes()).digest()
    url = f"sqlite+aiosqlite:///{foreign}"
    shell = {
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
        **dict.fromkeys(("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"), url),
        "PREFECT_API_KEY": "not-ours",
        "NO_PROXY": "",
        "no_proxy": "",
    }
    with platform_in(tmp_path / "chaos-home", shell) as platform:
        run = start("http_proxy at a dead port, and a foreign Prefect database, in the shell", on=platform)
        run.disturb(lambda: run.train_until(step=6))
        run.completes()
    assert hashlib.sha256(foreign.read_bytes()).digest() == before
