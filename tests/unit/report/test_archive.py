"""An archive is complete when its manifest is there, and says when a file is not what it was."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from disagg_core.report.archive import ArchiveUnusable, add_files, archive_files, probe_archive, verify_archive
from disagg_core.storage.place import BLOCK
from disagg_core.storage.trees import TreeDamaged

pytestmark = pytest.mark.unit


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    (tmp_path / "metrics" / "deep").mkdir(parents=True)
    (tmp_path / "metrics" / "train.jsonl").write_text("{}\n")
    (tmp_path / "metrics" / "deep" / "x.bin").write_bytes(b"\0" * 10)
    (tmp_path / "run.json").write_text("{}")
    sources = {"run.json": tmp_path / "run.json", "metrics": tmp_path / "metrics", "absent": tmp_path / "absent"}
    made = archive_files(sources, str(tmp_path / "archive"))
    assert (made.files, made.bytes) == (3, 15)
    return tmp_path / "archive"


@pytest.mark.parametrize(
    "url", ["ftp://127.0.0.1:1/x", "zip://x::file:///nowhere.zip", "dir:///x", "reference://x", "://x", "s3:/bucket/x"]
)
def test_a_storage_that_cannot_be_set_up_is_named_whatever_its_driver_raises(url: str) -> None:
    with pytest.raises(ArchiveUnusable, match=r"archive\.url: ") as refused:
        probe_archive(url)
    assert url in str(refused.value)


def test_the_manifest_names_every_file_with_its_hash(archive: Path) -> None:
    files = json.loads((archive / "manifest.json").read_text())["files"]
    assert set(files) == {"run.json", "metrics/train.jsonl", "metrics/deep/x.bin"}
    assert all(len(entry["sha256"]) == 64 for entry in files.values())
    assert verify_archive(str(archive)) == 3


def test_a_file_is_sent_and_checked_in_blocks_and_never_held(tmp_path: Path) -> None:
    with (tmp_path / "draft.safetensors").open("wb") as file:
        file.truncate(16 * BLOCK)
    tracemalloc.start()
    try:
        archive_files({"draft.safetensors": tmp_path / "draft.safetensors"}, str(tmp_path / "archive"))
        verify_archive(str(tmp_path / "archive"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * BLOCK


def test_every_damaged_file_is_named(archive: Path) -> None:
    (archive / "run.json").write_text("[]")
    (archive / "metrics" / "train.jsonl").unlink()
    (archive / "metrics" / "deep" / "x.bin").write_bytes(b"\0" * 9)
    with pytest.raises(TreeDamaged) as caught:
        verify_archive(str(archive))
    first, *files = str(caught.value).splitlines()
    assert first.endswith("3 of 3 files are damaged:")
    found = {name: damage for name, _, damage in (line.partition(": ") for line in files)}
    assert found["metrics/train.jsonl"] == "missing"
    assert found["metrics/deep/x.bin"] == "expected 10 bytes, found 9"
    assert found["run.json"].startswith("expected sha256 ")


@pytest.mark.parametrize(("manifest", "complaint"), [(None, "was not finished"), ("{", "cannot be read")])
def test_an_archive_needs_its_manifest(archive: Path, manifest: str | None, complaint: str) -> None:
    path = archive / "manifest.json"
    path.unlink() if manifest is None else path.write_text(manifest)
    with pytest.raises(TreeDamaged, match=complaint):
        verify_archive(str(archive))


def test_an_archive_that_is_written_anew_is_unfinished_until_its_end(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        archive_files({"run.json": tmp_path / "run.json"}, str(archive))
    monkeypatch.undo()
    with pytest.raises(TreeDamaged, match="was not finished"):
        verify_archive(str(archive))


def test_it_goes_to_any_fsspec_url(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    made = archive_files({"run.json": tmp_path / "run.json"}, "memory://archive/run")
    assert made.manifest == "memory://archive/run/manifest.json"
    assert verify_archive("memory://archive/run") == 1


def test_files_that_come_later_are_added_and_the_old_ones_left_alone(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    before = (archive / "run.json").stat()
    made = add_files({"report.json": tmp_path / "report.json", "absent": tmp_path / "absent"}, str(archive))
    assert (made.files, made.bytes) == (4, 17)
    assert verify_archive(str(archive)) == 4
    assert (archive / "run.json").stat() == before


def test_an_archive_stays_whole_when_what_comes_later_cannot_be_copied(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("the disk is gone")

    (tmp_path / "report.json").write_text("{}")
    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        add_files({"report.json": tmp_path / "report.json"}, str(archive))
    monkeypatch.undo()
    assert verify_archive(str(archive)) == 3


def test_only_a_finished_archive_takes_more_and_no_file_twice(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found \['run.json'\]"):
        add_files({"run.json": tmp_path / "run.json"}, str(archive))
    (archive / "manifest.json").unlink()
    with pytest.raises(TreeDamaged, match="was not finished"):
        add_files({"report.json": tmp_path / "run.json"}, str(archive))
