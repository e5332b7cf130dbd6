"""Metric files: one JSON object a line, appended by one process, read by people and by the plots.

They are there to be looked at, and no run depends on them: what cannot be written or read is left out, and said once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import msgspec

from disagg_core.files import LineFile

log = logging.getLogger(__name__)

MetricValue = str | int | float | bool | None | list[float] | list[int]


class JsonlMetrics:
    """Appends records to a ``.jsonl`` file; each gets `time`, seconds since the epoch."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = LineFile(path)
        self._encoder = msgspec.json.Encoder()
        self._lost = 0

    def write(self, **fields: MetricValue) -> None:
        """Append one record with `fields`; one that the file system refuses is lost."""
        line = self._encoder.encode({"time": round(time.time(), 3), **fields})
        try:
            self._file.append(line)
        except OSError as error:
            self._lost += 1
            if self._lost == 1:
                log.warning("%s: a record is lost, and others may be: %s", self._path, error)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> JsonlMetrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> Iterator[dict[str, MetricValue]]:
    """Yield the records of a metrics file, oldest first; nothing if there is none.

    A last line that is not finished is passed over, and so are damaged lines, which are counted in the log.
    """
    if not path.is_file():
        return
    damaged = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                record = _record_of(line)
                if record is None:
                    damaged += 1
                else:
                    yield record
    if damaged:
        log.warning("%s: passed over %d lines that cannot be read", path, damaged)


def _record_of(line: bytes) -> dict[str, MetricValue] | None:
    try:
        record = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return record if isinstance(record, dict) else None
