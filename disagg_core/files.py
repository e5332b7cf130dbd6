"""Files that a reader sees whole or not at all, and files of lines of which it sees whole ones."""

from __future__ import annotations

import os
from pathlib import Path

_BLOCK = 1 << 16


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader sees the old content or the new one, also after a crash.

    Raises:
        OSError: it cannot be written; the old content stays, and nothing beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


class LineFile:
    """Appends lines to a file, whole ones only; for one process at a time.

    What a killed process, a full disk or a dead host left of a last line is cut off when the file is opened, so that
    the next line does not become a part of it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b", buffering=0)
        self._end = _end_of_lines(path)
        self._file.truncate(self._end)

    def append(self, line: bytes) -> None:
        """Append `line`, which holds no line break, and a line break.

        Raises:
            OSError: it cannot be written; nothing of it stays in the file.
        """
        data = memoryview(line + b"\n")
        written = 0
        try:
            while written < len(data):
                written += self._file.write(data[written:]) or 0
        except OSError:
            self._file.truncate(self._end)
            raise
        self._end += written

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _end_of_lines(path: Path) -> int:
    """Return the offset behind the last line break of `path`, 0 if there is none."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _BLOCK)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0
