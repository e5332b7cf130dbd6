"""Metric files: one JSON object a line, appended by one process, read by people and by the plots."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import msgspec

MetricValue = str | int | float | bool | None | list[float] | list[int]


class JsonlMetrics:
    """Appends records to a ``.jsonl`` file; each gets `time`, seconds since the epoch."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)
        self._encoder = msgspec.json.Encoder()

    def write(self, **fields: MetricValue) -> None:
        """Append one record with `fields`."""
        self._file.write(self._encoder.encode({"time": round(time.time(), 3), **fields}) + b"\n")

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

    A last line that a killed process left unfinished is not yielded.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield msgspec.json.decode(line)
