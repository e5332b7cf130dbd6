"""An archive in a directory and on an S3 server: resumed after a kill, whole or not there, fetched back as it was."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from disagg_core.report.archive import add_files, archive_files, fetch_archive, verify_archive
from disagg_core.storage import trees
from disagg_core.storage.place import LocalPlace, Place, RemotePlace, StorageFailed, open_place
from disagg_core.storage.trees import TreeDamaged
from tests.integration.registry.conftest import ROOT

pytestmark = pytest.mark.integration

FILES = 12
KILLED = """
import os, signal, sys
from pathlib import Path
from disagg_core.report.archive import archive_files
from disagg_core.storage import place
url, source, left = sys.argv[1], Path(sys.argv[2]), [int(sys.argv[3])]
for kind in (place.LocalPlace, place.RemotePlace):
    def write(self, name, blocks, inner=kind.write):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        inner(self, name, blocks)
    kind.write = write
archive_files({"run": source}, url)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    source = tmp_path / "run"
    source.mkdir()
    for number in range(FILES):
        (source / f"{number:02d}.bin").write_bytes(bytes([number]) * (1000 + number))
    return source


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are really sent, in order."""
    names: list[str] = []
    for kind in (LocalPlace, RemotePlace):

        def write(self: Place, name: str, blocks: Iterable[bytes], inner: object = kind.write) -> None:
            names.append(name)
            inner(self, name, blocks)  # type: ignore[operator]

        monkeypatch.setattr(kind, "write", write)
    return names


def test_an_archive_that_was_cut_off_is_unfinished_and_only_the_rest_is_sent(
    url: str, run: Path, written: list[str]
) -> None:
    command = [sys.executable, "-c", KILLED, url, str(run), str(FILES // 2 + 1)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    with pytest.raises(TreeDamaged, match="was not finished"):
        verify_archive(url)

    archive_files({"run": run}, url)
    assert written == [f"run/{number:02d}.bin" for number in range(FILES // 2, FILES)] + ["manifest.json"]
    assert verify_archive(url) == FILES


def test_it_is_fetched_back_whole_or_in_part(url: str, run: Path, tmp_path: Path) -> None:
    archive_files({"run": run, "run.json": run / "00.bin"}, url)
    fetched = fetch_archive(url, tmp_path / "all")
    assert (fetched / "run" / "11.bin").read_bytes() == (run / "11.bin").read_bytes()
    assert len([path for path in fetched.rglob("*") if path.is_file()]) == FILES + 1
    part = fetch_archive(url, tmp_path / "part", below="run/0")
    assert len(list((part / "run").iterdir())) == 10
    open_place(url).write("run/05.bin", [b"rot"])
    with pytest.raises(TreeDamaged, match=r"run/05\.bin: expected 1005 bytes, found 3"):
        fetch_archive(url, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_is_no_longer_part_of_a_run_leaves_its_archive(url: str, run: Path) -> None:
    archive_files({"run": run}, url)
    add_files({"report.json": run / "00.bin"}, url)
    (run / "11.bin").unlink()
    archive_files({"run": run}, url)
    assert verify_archive(url) == FILES - 1
    assert set(open_place(url).names()) == {f"run/{number:02d}.bin" for number in range(FILES - 1)} | {"manifest.json"}


def test_a_storage_that_fails_now_and_then_is_asked_again(url: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "_FIRST_PAUSE_S", 0.01)
    failures = iter([True, False, True] + [False] * 100)
    for kind in (LocalPlace, RemotePlace):

        def write(self: Place, name: str, blocks: Iterable[bytes], inner: object = kind.write) -> None:
            if next(failures):
                raise StorageFailed("the storage is away")
            inner(self, name, blocks)  # type: ignore[operator]

        monkeypatch.setattr(kind, "write", write)
    archive_files({"run": run}, url)
    assert verify_archive(url) == FILES


def test_a_file_that_did_not_arrive_as_it_was_sent_is_sent_again_and_then_refused(
    url: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "RETRY_S", 0.2)
    for kind in (LocalPlace, RemotePlace):

        def write(self: Place, name: str, blocks: Iterable[bytes], inner: object = kind.write) -> None:
            inner(self, name, [b"".join(blocks)[:-1]])  # type: ignore[operator]

        monkeypatch.setattr(kind, "write", write)
    with pytest.raises(StorageFailed, match=r"run/00\.bin: not what was sent: expected 1000 bytes, found 999"):
        archive_files({"run": run}, url)
    with pytest.raises(TreeDamaged, match="was not finished"):
        verify_archive(url)
