"""Files of prompts, opened by what is in them: JSONL, a JSON array, CSV, TSV, Parquet, or a folder of these.

Every kind is indexed once, so that a record is read by its position in any order, and none is held in memory. What is
not known is refused with a word about what it seems to be.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from disagg_core.errors import PromptError
from disagg_core.prompts.content import PARQUET, Content
from disagg_core.prompts.files import JsonlFile
from disagg_core.prompts.json_values import RecordError, decode_json
from disagg_core.prompts.pinned import PinnedFile
from disagg_core.prompts.records import detect_format
from disagg_core.prompts.tables import CsvFile, ParquetFile, columns_of, missing_header
from disagg_core.run_spec.data import DataSection

_PACKED = (".gz", ".zst", ".zstd", ".bz2")
_KNOWN = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_BINARY = {
    b"PK\x03\x04": "a zip archive or an Excel sheet", b"SQLite format 3": "an SQLite database",
    b"ARROW1": "an Arrow file", b"\x80\x04": "a Python pickle", b"\xfd7zXZ": "an xz archive", b"%PDF": "a PDF",
    b"\xff\xfe": "text in UTF-16", b"\xfe\xff": "text in UTF-16", b"7z\xbc\xaf": "a 7z archive",
}  # fmt: skip
_EXPECTED = "expected JSONL, a JSON array, CSV or TSV with a header, or Parquet (each also as .gz, .zst or .bz2)"


class RecordFile(Protocol):
    """Records of one source by position. Safe from several threads."""

    @property
    def path(self) -> Path:
        """The file or folder."""
        ...

    @property
    def pin(self) -> PinnedFile:
        """What is read of it."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Any:
        """Return the record at `index`, decoded.

        Raises:
            RecordError: it cannot be.
        """
        ...

    def where(self, index: int) -> str:
        """Return ``file:place`` of the record at `index`; the place is a line, a row or a record."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...


def open_records(path: Path, data: DataSection, pinned: PinnedFile | None = None) -> RecordFile:
    """Open the records at `path`, whose columns are named as `data` says.

    Raises:
        PromptError: it is missing, empty, or no file of records.
        DataChanged: it is not what was pinned.
    """
    if path.is_dir():
        return RecordFolder(path, data, pinned)
    content = Content.open(path, pinned)
    try:
        file = _of_content(content, data)
        _check_columns(file, data)
    except PromptError:
        content.close()
        raise
    return file


def kind_of_file(path: Path) -> str:
    """Return the ending of `path` that says what it holds, without that of a compression."""
    inner = path.with_suffix("") if path.suffix.lower() in _PACKED else path
    return inner.suffix.lower()


def _of_content(content: Content, data: DataSection) -> RecordFile:
    head, suffix = content.head, kind_of_file(content.path)
    if head.startswith(PARQUET):
        return ParquetFile(content, data.fields)
    first = head.lstrip()[:1]
    if first != b"{":
        _refuse_binary(content.path, head)
    if suffix in (".csv", ".tsv"):
        return CsvFile(content)
    if first == b"[":
        return JsonArrayFile(content)
    if first == b"{" and _is_one_object(head):
        raise PromptError(
            f"{content.path}: {_EXPECTED}, found one JSON object over several lines; write one object a line, or a "
            "list of objects"
        )
    return JsonlFile(content.path, content=content)


def _refuse_binary(path: Path, head: bytes) -> None:
    """Raise PromptError if `head` does not begin a text."""
    found = next((name for magic, name in _BINARY.items() if head.startswith(magic)), None)
    if found is None and (b"\0" in head or not _is_utf8(head)):
        found = "a binary file"
    if found is not None:
        raise PromptError(f"{path}: {_EXPECTED}, found {found}")


def _is_utf8(head: bytes) -> bool:
    """Tell whether most of `head` is UTF-8: a single broken record makes no binary file."""
    return head.decode(errors="replace").count("\ufffd") <= len(head) // 20


def _is_one_object(head: bytes) -> bool:
    lines = [line for line in head.split(b"\n")[:50] if line.strip()]
    if len(lines) < 2 or lines[1].lstrip().startswith(b"{"):
        return False
    try:
        decode_json(lines[0])
    except RecordError:
        return lines[0].strip() == b"{" or lines[1][:1] in (b" ", b"\t", b"}")
    return False


def _check_columns(file: RecordFile, data: DataSection) -> None:
    columns = columns_of(file)
    if columns is None or data.format != "auto":
        return
    named: dict[str, Any] = {str(name): column for name, column in data.fields.items() if column in columns}
    try:
        detect_format({**dict.fromkeys(columns), **named})
    except RecordError as error:
        raise missing_header(file.path, columns, error) from error


class JsonArrayFile:
    """A JSON list of records over any number of lines. Safe from several threads.

    Raises:
        PromptError: the list has no end or no record.
    """

    _SIGNS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{},]', re.DOTALL)

    def __init__(self, content: Content) -> None:
        import mmap

        self.path = content.path
        self.pin = content.pin
        self._content = content
        with mmap.mmap(content.file.fileno(), content.size, prot=mmap.PROT_READ) as text:
            places = list(self._elements(text))
            self._places = np.array(places, dtype=np.int64).reshape(-1, 2)
            self._lines = self._line_numbers(text)
        if not len(self):
            raise PromptError(f"{self.path}: expected at least one prompt, found an empty list")

    def _elements(self, text: Any) -> Iterator[tuple[int, int]]:
        """Yield where each element of the list begins and ends."""
        depth, start = 0, 0
        for sign in self._SIGNS.finditer(text):
            what = sign[0]
            if what in (b"[", b"{"):
                depth += 1
                start = sign.end() if depth == 1 else start
            elif what in (b"]", b"}"):
                depth -= 1
                if depth == 0:
                    if text[start : sign.start()].strip():
                        yield start, sign.start()
                    if text[sign.end() :].strip():
                        break
                    return
            elif what == b"," and depth == 1:
                yield start, sign.start()
                start = sign.end()
        raise PromptError(f"{self.path}: expected one JSON list, found one that does not end with the file")

    def _line_numbers(self, text: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the line on which each element's first sign stands."""
        numbers, line, seen = [], 1, 0
        for start, stop in self._places:
            raw = text[start:stop]
            first = int(start) + len(raw) - len(raw.lstrip())
            line += text[seen:first].count(b"\n")
            seen = first
            numbers.append(line)
        return np.array(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, index: int) -> Any:
        """Return the element at `index`.

        Raises:
            RecordError: it is no JSON.
        """
        return decode_json(self._content.part(*map(int, self._places[index])))

    def where(self, index: int) -> str:
        """Return the place of an element, counted from 1, and its line."""
        return f"{self.path.name}:record {index + 1} (line {self._lines[index]})"

    def close(self) -> None:
        """Close the file."""
        self._content.close()


class RecordFolder:
    """All files of records below a folder, one after the other in the order of their names.

    Raises:
        PromptError: there is none, or one of them cannot be read.
        DataChanged: they are not what was pinned.
    """

    def __init__(self, path: Path, data: DataSection, pinned: PinnedFile | None = None) -> None:
        self.path = path
        found = sorted(file for file in path.rglob("*") if file.is_file() and kind_of_file(file) in _KNOWN)
        found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts)]
        if not found:
            raise PromptError(f"data.prompts: {path}: {_EXPECTED}, found a folder without any ({', '.join(_KNOWN)})")
        self._files: list[RecordFile] = []
        try:
            for file in found:
                self._files.append(open_records(file, data))
            self.pin = self._pin()
            if pinned is not None:
                pinned.check(self.pin, path)
        except PromptError:
            self.close()
            raise
        self._starts = [0]
        for records in self._files:
            self._starts.append(self._starts[-1] + len(records))

    def _pin(self) -> PinnedFile:
        """Return all sizes together, and a hash over the names and hashes of the files."""
        names = (f"{file.path.relative_to(self.path)}:{file.pin.sha256}\n" for file in self._files)
        digest = hashlib.sha256("".join(names).encode())
        return PinnedFile(size=sum(file.pin.size for file in self._files), sha256=digest.hexdigest())

    def __len__(self) -> int:
        return self._starts[-1]

    def _at(self, index: int) -> tuple[RecordFile, int]:
        number = bisect.bisect_right(self._starts, index) - 1
        return self._files[number], index - self._starts[number]

    def read(self, index: int) -> Any:
        """Return the record at `index`.

        Raises:
            RecordError: it cannot be read.
        """
        file, position = self._at(index)
        return file.read(position)

    def where(self, index: int) -> str:
        """Return ``file:place`` of the record at `index`."""
        file, position = self._at(index)
        return file.where(position)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()
