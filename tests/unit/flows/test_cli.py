"""The command line without a platform: what it says and how it exits when something is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from disagg_core.archive import archive_files

pytestmark = pytest.mark.unit

Draftline = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def draftline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Draftline:
    """Run the command in a home of its own."""
    monkeypatch.setenv("DRAFTLINE_HOME", str(tmp_path / "home"))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flows.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return run


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("export", "nothing", "--out", "x"), "error: no run 'nothing' in "),
        (("evaluate", "nothing"), "error: no run 'nothing' in "),
        (("archive", "verify", "nothing"), "error: nothing: no such run and no such archive"),
        (("doctor", "--no-machine", "--server", "http://127.0.0.1:1"), "error: to probe a server, say what it should"),
    ],
)
def test_bad_input_is_one_message_and_its_traceback_is_there_for_the_asking(
    draftline: Draftline, arguments: tuple[str, ...], complaint: str
) -> None:
    plain = draftline(*arguments)
    assert plain.returncode == 2
    assert plain.stderr.startswith(complaint)
    assert len(plain.stderr.splitlines()) == 1
    for debugged in (draftline(*arguments, "--debug"), draftline("--debug", *arguments)):
        assert debugged.returncode == 2
        assert "Traceback" in debugged.stderr
        assert debugged.stderr.splitlines()[-1].startswith(complaint)


def test_an_archive_is_verified_from_the_command_line(draftline: Draftline, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / name).write_text(name)
    archive = tmp_path / "archive"
    archive_files({name: tmp_path / name for name in ("a.txt", "b.txt", "c.txt")}, str(archive))

    sound = draftline("archive", "verify", str(archive))
    assert (sound.returncode, sound.stdout) == (0, f"{archive}: 3 files are what the manifest says\n")

    (archive / "a.txt").unlink()
    (archive / "b.txt").write_text("B.txt")
    damaged = draftline("archive", "verify", str(archive))
    assert damaged.returncode == 2
    assert "2 of 3 files are damaged" in damaged.stderr
    assert "a.txt: missing" in damaged.stderr
    assert "b.txt: expected sha256 " in damaged.stderr
    assert "c.txt" not in damaged.stderr
