"""The command line without a platform: what it says and how it exits when something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from disagg_core.report.archive import archive_files
from disagg_core.settings import get_settings
from flows.cli import app as cli

pytestmark = pytest.mark.unit


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


Draftline = Callable[..., Ended]


@pytest.fixture
def draftline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Draftline]:
    """Run the command in a home of its own."""
    monkeypatch.setenv("DRAFTLINE_HOME", str(tmp_path / "home"))
    get_settings.cache_clear()

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["draftline", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return Ended(int(end.value.code or 0), said.out, said.err)

    yield run
    get_settings.cache_clear()


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


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A run that another version of draftline has made, with its report."""
    run = tmp_path / "home" / "runs" / "night-1a2b"
    run.mkdir(parents=True)
    for name in ("run.json", "report.json"):
        (run / name).write_text('{"run_id": "night-1a2b"}')
    return run


@pytest.mark.parametrize(
    ("arguments", "document"),
    [
        (("export", "night", "--out", "x"), "run.json"),
        (("evaluate", "night"), "run.json"),
        (("archive", "verify", "night"), "report.json"),
    ],
)
def test_what_another_version_wrote_is_named_and_no_traceback(
    draftline: Draftline, old_run: Path, arguments: tuple[str, ...], document: str
) -> None:
    ended = draftline(*arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {old_run / document}: written by another version of draftline (")
    assert len(ended.stderr.splitlines()) == 1
    assert "report of another version" in draftline("status").stdout


def test_the_beginning_of_an_id_that_two_runs_share_is_refused(draftline: Draftline, old_run: Path) -> None:
    other = old_run.with_name("night-3c4d")
    other.mkdir()
    (other / "run.json").write_text("{}")
    for arguments in (("export", "night", "--out", "x"), ("evaluate", "night"), ("archive", "verify", "night")):
        ended = draftline(*arguments)
        assert ended.returncode == 2
        assert "'night' is the beginning of 2 runs" in ended.stderr
