"""The bytes of a prompts file: pinned by their hash, unpacked where they are compressed.

A compressed file cannot be read from the middle, so it is unpacked once, into a file without a name in the system's
folder for temporary files (TMPDIR), which the system removes with the process. The pin is that of the file as it lies.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from disagg_core.errors import PromptError
from disagg_core.prompts.pinned import DataChanged, PinnedFile

BOM = b"\xef\xbb\xbf"
PARQUET = b"PAR1"
HEAD_BYTES = 64 * 1024
_CHUNK_BYTES = 16 * 1024**2
BLOCK_BYTES = 64 * 1024
"""What is compared at a read with what was there when the file was opened."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}


@dataclass(frozen=True)
class Content:
    """`size` bytes of records in an open file at `path`, or unpacked from it, and the pin of `path`.

    `sums` are CRC-32s of its blocks when it was opened; there are none of an unpacked copy, which nobody else has.
    """

    path: Path
    file: BinaryIO
    size: int
    pin: PinnedFile
    sums: Sequence[int] = ()

    @classmethod
    def open(cls, path: Path, pinned: PinnedFile | None = None) -> Content:
        """Open `path`; of a `pinned` one the first so many bytes, whatever lines were appended to it since.

        Raises:
            PromptError: it is missing, cannot be read, or cannot be unpacked.
            DataChanged: it is not what was pinned.
        """
        if not path.is_file():
            raise PromptError(f"data.prompts: no such file: {path}; give a file of prompts, such as JSONL")
        try:
            file = path.open("rb")
        except OSError as error:
            raise PromptError(f"data.prompts: {path}: {error.strerror}") from error
        try:
            start = os.pread(file.fileno(), 4, 0)
            packed = next((name for magic, name in _COMPRESSED.items() if start.startswith(magic)), None)
            grows = packed is None and start != PARQUET  # the others are read as wholes
            size = pinned.size if pinned is not None and grows else os.fstat(file.fileno()).st_size
            pin, sums = _hash(file, size)
            if pinned is not None:
                pinned.check(pin, path)
            if packed is None:
                return cls(path, file, pin.size, pin, sums)
            unpacked = _unpack(path, packed)
        except PromptError:
            file.close()
            raise
        file.close()
        return cls(path, unpacked, os.fstat(unpacked.fileno()).st_size, pin)

    def part(self, start: int, stop: int) -> bytes:
        """Return a part of the content. Safe from several threads.

        Raises:
            DataChanged: it, or what stands around it, is not what it was when the file was opened.
        """
        if not self.sums or stop <= start:
            return os.pread(self.file.fileno(), stop - start, start)
        first = start // BLOCK_BYTES
        begin, end = first * BLOCK_BYTES, min(-(-stop // BLOCK_BYTES) * BLOCK_BYTES, self.size)
        raw = os.pread(self.file.fileno(), end - begin, begin)
        sums = _checksums(raw)
        if len(raw) != end - begin or sums != self.sums[first : first + len(sums)]:
            raise DataChanged(
                f"{self.path}: bytes {begin} to {end} were changed while the run read them; put the file back as it "
                "was (lines may be appended), or start a new run with what it is now"
            )
        return raw[start - begin : stop - begin]

    @property
    def head(self) -> bytes:
        """The first bytes, without a byte order mark."""
        return self.part(0, min(HEAD_BYTES, self.size)).removeprefix(BOM)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _hash(file: BinaryIO, size: int) -> tuple[PinnedFile, list[int]]:
    """Return pin and checksums of the first `size` bytes of `file`, or of all that there are."""
    digest, offset, sums = hashlib.sha256(), 0, list[int]()
    while chunk := file.read(min(_CHUNK_BYTES, size - offset)):
        digest.update(chunk)
        sums += _checksums(chunk)
        offset += len(chunk)
    file.seek(0)
    return PinnedFile(size=offset, sha256=digest.hexdigest()), sums


def _checksums(raw: bytes) -> list[int]:
    """Return the CRC-32 of each block of `raw`."""
    view = memoryview(raw)
    return [zlib.crc32(view[start : start + BLOCK_BYTES]) for start in range(0, len(raw), BLOCK_BYTES)]


def _unpack(path: Path, packed: str) -> BinaryIO:
    import pyarrow as pa

    unpacked: BinaryIO = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `Content.close`
    try:
        with pa.input_stream(str(path), compression=packed) as stream:
            shutil.copyfileobj(stream, unpacked, _CHUNK_BYTES)
    except (OSError, pa.ArrowException) as error:
        unpacked.close()
        raise PromptError(
            f"{path}: cannot be unpacked as {packed} into {tempfile.gettempdir()} (TMPDIR): {error}"
        ) from error
    unpacked.flush()
    return unpacked
