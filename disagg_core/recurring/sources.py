"""A source of prompts that grows: its records in order, how many there were, and whether they are still the same.

Whatever `data.prompts` names will do, as long as new records come behind the old ones: a file that is appended to, a
directory (or a prefix in an object store) whose files are named by date, a dataset. How far a run came is a
`DataMark`: a number of records, and a hash over them, by which a source that was rewritten is noticed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from disagg_core.errors import PromptError
from disagg_core.prompts.files import HF_PREFIX, DatasetName, DatasetStream
from disagg_core.prompts.json_values import RecordError
from disagg_core.prompts.record_files import open_records
from disagg_core.registry.versions import DataMark
from disagg_core.run_spec.data import DataSection
from disagg_core.storage.place import open_place


def records_of(data: DataSection, cache: Path) -> Iterator[tuple[str, Any]]:
    """Yield the records of `data.prompts` in the source's own order, each with where it stands.

    A record that cannot be read is yielded as the text of what is wrong with it, which no format takes for a prompt. A
    URL's files are copied to `cache` first.

    Raises:
        PromptError: there is no such source, or it has no record.
        StorageFailed, StorageUnusable: the storage does not answer.
    """
    if data.prompts.startswith(HF_PREFIX):
        yield from _rows(DatasetName.parse(data.prompts))
        return
    path = _copied(data.prompts, cache) if "://" in data.prompts else Path(data.prompts).expanduser()
    with closing(open_records(path, data)) as file:
        for index in range(len(file)):
            try:
                yield file.where(index), file.read(index)
            except RecordError as error:
                yield file.where(index), f"{file.where(index)}: {error}"


def _rows(name: DatasetName) -> Iterator[tuple[str, Any]]:
    with closing(DatasetStream(name)) as stream:
        for position in itertools.count():
            row = stream.read(0, position, seed=0, skip=0, shuffle=False)
            if row is None:
                return
            yield f"{name.name}:{position}", row


def _copied(url: str, cache: Path) -> Path:
    """Copy the files below `url` that `cache` does not have in their present size, drop those that are gone."""
    place = open_place(url)
    folder = cache / hashlib.sha256(place.url.encode()).hexdigest()[:16]
    names = place.names()
    if not names:
        raise PromptError(f"data.prompts: {url}: expected at least one file of prompts, found none")
    for name in names:
        copy = folder / name
        if not copy.is_file() or copy.stat().st_size != place.size(name):
            copy.parent.mkdir(parents=True, exist_ok=True)
            part = copy.with_name(f".{copy.name}.part")
            with part.open("wb") as file:
                file.writelines(place.blocks(name))
            part.replace(copy)
    for known in [path for path in folder.rglob("*") if path.is_file()]:
        if known.relative_to(folder).as_posix() not in names:
            known.unlink()
    return folder


def line_of(record: Any) -> bytes:
    """Return a record as a line of JSON. What JSON has no word for, such as a date in a table, is written as text."""
    return json.dumps(record, ensure_ascii=True, default=str).encode() + b"\n"


class Marks:
    """The mark of a source, taken while its records go by."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._digest = hashlib.sha256()
        self._count = 0
        self._newest = ""

    def take(self, where: str, line: bytes) -> None:
        """Count a record in."""
        self._digest.update(line)
        self._count += 1
        self._newest = where

    def mark(self) -> DataMark:
        """Return the mark behind the records that were taken."""
        return DataMark(
            source=self._source, prompts=self._count, sha256=self._digest.copy().hexdigest(), newest=self._newest
        )
