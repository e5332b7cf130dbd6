"""Tables as prompts: CSV and TSV read by an index of their records, Parquet by row.

A Parquet file is read forward only and by groups of rows. The columns that matter are therefore written once as Arrow
record batches into a file without a name, which is mapped into memory and read by position.
"""

from __future__ import annotations

import csv
import io
import mmap
import sys
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from disagg_core.errors import PromptError
from disagg_core.prompts.content import BOM, Content
from disagg_core.prompts.json_values import RecordError
from disagg_core.prompts.records import columns_read
from disagg_core.run_spec.data import FieldName

_BATCH_ROWS = 512


class CsvFile:
    """A CSV or TSV file with a header line; a record may span lines. Safe from several threads.

    Empty cells are nothing. Lists and objects stand in cells as JSON.

    Raises:
        PromptError: it has no header or no record.
    """

    def __init__(self, content: Content) -> None:
        self.path = content.path
        self.pin = content.pin
        self._content = content
        csv.field_size_limit(sys.maxsize)
        header = content.head.split(b"\n", 1)[0].decode(errors="replace")
        self._delimiter = max("\t,;|", key=header.count) if header else ","
        starts, numbers = array("q"), array("q")
        for start, number in self._index():
            starts.append(start)
            numbers.append(number)
        self._starts = np.array([*starts, content.size], dtype=np.int64)
        self._numbers = np.array(numbers, dtype=np.int64)
        if len(starts) < 2:
            raise PromptError(f"{self.path}: expected a header line and at least one record, found {len(starts)} lines")
        self.columns = self._header()

    def _index(self) -> Iterator[tuple[int, int]]:
        """Yield where each record begins: its byte and its line."""
        offset, number = 0, 0

        def lines() -> Iterator[str]:
            nonlocal offset, number
            self._content.file.seek(0)
            while offset < self._content.size:
                raw = self._content.file.readline(self._content.size - offset)
                offset += len(raw)
                number += 1
                yield raw.decode(errors="surrogateescape")

        rows = csv.reader(lines(), delimiter=self._delimiter, strict=True)
        while True:
            start, line = offset, number + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error:
                row = ["broken"]
            if any(cell.strip() for cell in row):
                yield start, line

    def _header(self) -> list[str]:
        try:
            columns = [name.strip() for name in self._row(0)]
        except RecordError as error:
            raise PromptError(f"{self.path}, line 1: {error}") from error
        if twice := sorted({name for name in columns if columns.count(name) > 1}):
            raise PromptError(f"{self.path}: expected every column once in the header, found {', '.join(twice)} twice")
        return columns

    def _row(self, index: int) -> list[str]:
        raw = self._content.part(int(self._starts[index]), int(self._starts[index + 1])).removeprefix(BOM)
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise RecordError(f"invalid UTF-8, byte {raw[error.start]:#04x} at place {error.start + 1}") from error
        try:
            return next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter, strict=True))
        except csv.Error as error:
            raise RecordError(f"no CSV: {error}") from error

    def __len__(self) -> int:
        return len(self._numbers) - 1

    def read(self, index: int) -> dict[str, str | None]:
        """Return the record at `index` by the names of the header.

        Raises:
            RecordError: it is no UTF-8, no CSV, or has another number of cells than the header.
        """
        row = self._row(index + 1)
        if len(row) != len(self.columns):
            raise RecordError(f"expected {len(self.columns)} cells as in the header, found {len(row)}")
        return {name: cell if cell.strip() else None for name, cell in zip(self.columns, row, strict=True)}

    def where(self, index: int) -> str:
        """Return ``file:line`` of the record's first line."""
        return f"{self.path.name}:{self._numbers[index + 1]}"

    def close(self) -> None:
        """Close the file."""
        self._content.close()


class ParquetFile:
    """A Parquet file, read by row. Safe from several threads.

    Raises:
        PromptError: it is damaged or has no row.
    """

    def __init__(self, content: Content, fields: Mapping[FieldName, str]) -> None:
        import pyarrow as pa

        self.path = content.path
        self.pin = content.pin
        self._rows: Any = None
        try:
            self.columns, self._starts = self._spool(content, fields)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise PromptError(f"{self.path}: expected a Parquet file, found a damaged one: {error}") from error
        if not len(self):
            raise PromptError(f"{self.path}: expected at least one prompt, found a table without rows")

    def _spool(self, content: Content, fields: Mapping[FieldName, str]) -> tuple[list[str], np.ndarray[Any, Any]]:
        """Write the rows where they can be read by position; return all columns and the first row of each batch."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        source = pq.ParquetFile(pa.PythonFile(content.file, mode="r"))
        columns: list[str] = source.schema_arrow.names
        wanted = columns_read(columns, fields)
        starts = [0]
        with tempfile.TemporaryFile() as spool:
            schema = pa.schema([source.schema_arrow.field(name) for name in wanted])
            with pa.ipc.new_file(pa.PythonFile(spool, mode="w"), schema) as writer:
                for batch in source.iter_batches(_BATCH_ROWS, columns=wanted) if wanted else ():
                    writer.write_batch(batch)
                    starts.append(starts[-1] + batch.num_rows)
            spool.flush()
            mapped = mmap.mmap(spool.fileno(), 0, prot=mmap.PROT_READ)
        self._rows = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(mapped)))
        if not wanted:
            starts.append(source.metadata.num_rows)
        return columns, np.array(starts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, index: int) -> dict[str, Any]:
        """Return the row at `index`: of its columns, those that are looked at."""
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        row: list[dict[str, Any]] = self._rows.get_batch(batch).slice(index - int(self._starts[batch]), 1).to_pylist()
        return row[0]

    def where(self, index: int) -> str:
        """Return the place of a row, counted from 1."""
        return f"{self.path.name}:row {index + 1}"

    def close(self) -> None:
        """Let go of the rows."""
        self._rows = None


def columns_of(file: object) -> Sequence[str] | None:
    """Return the columns of a table; None for what has no columns."""
    return file.columns if isinstance(file, CsvFile | ParquetFile) else None


def missing_header(path: Path, columns: Sequence[str], error: RecordError) -> PromptError:
    """Return what is said of a table whose columns have no known names."""
    shown = ", ".join(repr(column[:30]) for column in columns[:6])
    return PromptError(
        f"{path}: {error}; the first line of the table names its columns and reads {shown}: if that is a record, put a "
        "line such as prompt,response above it"
    )
