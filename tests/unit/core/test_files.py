"""Files that are whole or not there, files of whole lines, on disks that fill up and after hosts that died."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from disagg_core.files import LineFile, write_atomically

pytestmark = pytest.mark.unit


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Let no file grow beyond `nbytes`: a write up to there is short, the next one fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        (b"", b""),
        (b"one\ntwo\n", b"one\ntwo\n"),
        (b"one\ntw", b"one\n"),
        (b"on", b""),
        (b"one\n" + bytes(200_000), b"one\n"),
        (b"o" * 100_000 + b"\n" + b"t" * 100_000, b"o" * 100_000 + b"\n"),
    ],
    ids=["empty", "whole", "torn", "torn first line", "a page of zeros", "long lines"],
)
def test_a_torn_tail_is_cut_when_the_file_is_opened(tmp_path: Path, found: bytes, kept: bytes) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(found)
    lines = LineFile(path)
    lines.append(b"next")
    lines.close()
    assert path.read_bytes() == kept + b"next\n"


def test_a_line_that_does_not_fit_leaves_no_part_of_it(tmp_path: Path) -> None:
    lines = LineFile(tmp_path / "deep" / "x.jsonl")
    lines.append(b"a" * 60)
    with largest_file(100), pytest.raises(OSError, match="too large"):
        lines.append(b"b" * 60)
    lines.append(b"c")
    assert (tmp_path / "deep" / "x.jsonl").read_bytes() == b"a" * 60 + b"\nc\n"


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")
    with largest_file(100), pytest.raises(OSError, match="too large"):
        write_atomically(path, b"n" * 200)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
