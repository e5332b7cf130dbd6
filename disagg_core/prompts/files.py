"""The two commonest places of prompt records: a JSONL file with an index of its lines, and a streamed dataset.

Neither is held in memory. A file is hashed and indexed (eight bytes a line), and read by position. A stream
is read forward only, through the seeded shuffle buffer of `datasets`; going on in the middle means reading up to there
again.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from disagg_core.errors import PromptError, classify
from disagg_core.processes.retry import Retry
from disagg_core.prompts.content import BOM, Content
from disagg_core.prompts.json_values import decode_json
from disagg_core.prompts.pinned import PinnedFile, PinnedStream, directory_revision
from disagg_core.run_spec.section import is_local

HF_PREFIX = "hf:"
_CHUNK_BYTES = 16 * 1024**2
_BLOCK_BYTES = 64 * 1024
"""So many bytes share a checksum: whoever changes them while the file is read is noticed at the next read of them."""
_SHUFFLE_BUFFER = 10_000
_AWAY_S = 600.0
_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 10.0
_NEWLINE = 10
_WHITE = np.isin(np.arange(256), [9, 10, 11, 12, 13, 32, BOM[0]])


class JsonlFile:
    """A JSONL file, read by line. Blank lines do not count. Safe from several threads.

    Of a file that is `pinned` the first so many bytes are read, whatever was appended to it since.

    Raises:
        PromptError: the file is missing, unreadable or has no record.
        DataChanged: it is not what was pinned.
    """

    def __init__(self, path: Path, pinned: PinnedFile | None = None, *, content: Content | None = None) -> None:
        self.path = path
        self._content = Content.open(path, pinned) if content is None else content
        self.pin = self._content.pin
        self._starts, self._numbers = _index(self._content)
        if not len(self._starts):
            self.close()
            raise PromptError(f"{path}: expected at least one prompt, found an empty file")

    def __len__(self) -> int:
        return len(self._starts)

    def line(self, index: int) -> bytes:
        """Return the bytes of the record at `index` (0-based, blank lines not counted).

        Raises:
            DataChanged: they, or their neighbours, are not those that were there when the file was opened.
        """
        start = int(self._starts[index])
        stop = int(self._starts[index + 1]) if index + 1 < len(self._starts) else self._content.size
        return self._content.part(start, stop).split(b"\n", 1)[0].removeprefix(BOM)

    def where(self, index: int) -> str:
        """Return ``file:line`` of the record at `index`, as an editor counts."""
        number = index + 1 if self._numbers is None else int(self._numbers[index])
        return f"{self.path.name}:{number}"

    def read(self, index: int) -> Any:
        """Return the record at `index`, decoded.

        Raises:
            RecordError: the line is no JSON.
        """
        return decode_json(self.line(index))

    def close(self) -> None:
        """Close the file."""
        self._content.close()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _index(content: Content) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64] | None]:
    """Return where each record starts, and the line numbers if there are blank lines."""
    ends: list[npt.NDArray[np.int64]] = []
    blank: list[npt.NDArray[np.int64]] = []
    """Lines that may be white space: those whose first byte is."""
    lines = 0
    start_of_line = True
    for offset in range(0, content.size, _CHUNK_BYTES):
        chunk = np.frombuffer(content.part(offset, min(offset + _CHUNK_BYTES, content.size)), dtype=np.uint8)
        stops = np.flatnonzero(chunk == _NEWLINE)
        firsts = np.concatenate([[0] if start_of_line else [], stops + 1]).astype(np.int64)
        firsts = firsts[firsts < len(chunk)]
        white = np.flatnonzero(_WHITE[chunk[firsts]])
        blank.append(white + lines + (0 if start_of_line else 1))
        ends.append(stops + offset)
        lines += len(stops)
        start_of_line = bool(chunk[-1] == _NEWLINE)
    if content.size and not start_of_line:
        ends.append(np.array([content.size], dtype=np.int64))
    stops = np.concatenate(ends) if ends else np.empty(0, dtype=np.int64)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), stops[:-1] + 1]) if len(stops) else stops
    full = stops > starts
    for line in np.concatenate(blank) if blank else ():
        full[line] = bool(content.part(int(starts[line]), int(stops[line])).removeprefix(BOM).strip())
    if full.all():
        return starts, None
    numbers = np.flatnonzero(full)
    return starts[numbers], numbers + 1


def _may_pass(error: BaseException) -> bool:
    """Tell whether a dataset that was read with `error` may be read again a little later."""
    return isinstance(error, OSError) or classify(error) == "infrastructure"


@dataclass(frozen=True)
class DatasetName:
    """A dataset as named in a run document: ``hf:<name or directory>[:split]``."""

    name: str
    split: str

    @classmethod
    def parse(cls, prompts: str) -> DatasetName:
        """Return the parts of `prompts`, which starts with ``hf:``; the split is ``train`` unless given."""
        name, _, split = prompts.removeprefix(HF_PREFIX).partition(":")
        if not name:
            raise PromptError(f"data.prompts: expected hf:<name or directory>[:split], found {prompts!r}")
        return cls(name, split or "train")


class DatasetStream:
    """The records of a Hugging Face dataset (hub name, or local directory), streamed in a seeded order.

    Of a hub dataset that is `pinned` that revision is read, whatever was pushed since.

    Raises:
        PromptError: there is no such dataset or split.
        DataChanged: it is not what was pinned.
    """

    def __init__(self, name: DatasetName, pinned: PinnedStream | None = None) -> None:
        self.name = name
        self._lock = threading.Lock()
        self._dataset, revision = self._load(pinned)
        self.pin = PinnedStream(revision=revision, rows=self.rows)
        if pinned is not None:
            pinned.check(self.pin, name.name)
        self._order: tuple[int, int, int, bool] | None = None
        self._iterator: Iterator[Any] = iter(())
        self._position = 0
        self.ended_at: int | None = None
        """How many rows an epoch has, once a read has come to its end."""

    def _load(self, pinned: PinnedStream | None) -> tuple[Any, str]:
        """Return the dataset and its revision."""
        import datasets

        source, split = self.name.name, self.name.split
        directory = is_local(source) or Path(source).is_dir()
        if directory:
            source = str(Path(source).expanduser())
            if not Path(source).is_dir():
                raise PromptError(f"data.prompts: no such dataset directory: {source}")
        revision = pinned.revision if pinned is not None and not directory else None
        try:
            builder = datasets.load_dataset_builder(source, revision=revision)
            dataset = builder.as_streaming_dataset(split=split)
        except (OSError, ValueError, RuntimeError) as error:
            raise PromptError(
                f"data.prompts: cannot read dataset {self.name.name!r}, split {split!r}: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
        if not directory:
            return dataset, str(builder.hash)  # the commit
        return dataset, directory_revision(Path(file) for file in builder.config.data_files[split])

    @property
    def rows(self) -> int | None:
        """Rows of the split, if its card says so; what it really has shows only when the stream has ended."""
        info = self._dataset.info.splits
        entry = info.get(self.name.split) if info else None
        return entry.num_examples if entry and entry.num_examples else None

    def first(self, count: int) -> list[Any]:
        """Return the first `count` rows in the dataset's own order."""
        return list(islice(iter(self._dataset), count))

    def read(self, epoch: int, position: int, *, seed: int, skip: int, shuffle: bool) -> Any | None:
        """Return the row at `position` of an epoch's order over all rows but the first `skip`; None at the end.

        Positions that ascend cost one row each; going back starts the stream again, and so does a network that fails
        for a moment, which is waited for.

        Raises:
            Exception: of the network or mount, if it still failed after ten minutes; any other at once.
        """
        patiently = Retry(
            _may_pass, budget_s=_AWAY_S, every_s=_PAUSE_S, longest_s=_LONGEST_PAUSE_S, what=self.name.name
        )
        with self._lock:
            return patiently(self._read, (epoch, seed, skip, shuffle), position)

    def _read(self, order: tuple[int, int, int, bool], position: int) -> Any | None:
        if self._order != order or position < self._position:
            self._restart(order)
        self._order = None  # an iterator that fails is of no more use
        try:
            while self._position < position:
                next(self._iterator)
                self._position += 1
            row = next(self._iterator)
        except StopIteration:
            self.ended_at = self._position
            return None
        self._position += 1
        self._order = order
        return row

    def _restart(self, order: tuple[int, int, int, bool]) -> None:
        epoch, seed, skip, shuffle = order
        rows = self._dataset.skip(skip)
        if shuffle:
            rows = rows.shuffle(seed=(seed + epoch) % 2**32, buffer_size=_SHUFFLE_BUFFER)
        self._iterator = iter(rows)
        self._position = 0
        self._order = order

    def close(self) -> None:
        """Let go of the stream."""
        self._iterator = iter(())
        self._order = None
