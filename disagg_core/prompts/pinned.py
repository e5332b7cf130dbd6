"""What the data of a run was when the run was planned, so that no later process of the run reads other data.

The order of the prompts is a permutation of their number: a file with one line more is another order, in which samples
are trained twice, never, or although they are held out. A run therefore reads exactly the bytes that it was planned
with, or says that they are gone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from disagg_core.errors import PromptError

_SAMPLE_BYTES = 1024**2


class DataChanged(PromptError):
    """The data is not what the run was planned with: the file, what was expected and what was found are named."""


class _Pin(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PinnedFile(_Pin):
    """The first `size` bytes of a file, and their SHA-256. A file that grew behind them is still the same."""

    size: int
    sha256: str

    @classmethod
    def of(cls, content: bytes) -> PinnedFile:
        """Return the pin of a file that holds `content`."""
        return cls(size=len(content), sha256=hashlib.sha256(content).hexdigest())

    def check(self, found: PinnedFile, path: Path) -> None:
        """Compare with what was `found` in the first `size` bytes of `path`.

        Raises:
            DataChanged: they are fewer, or others.
        """
        if found == self:
            return
        change = f"only {found.size}" if found.size < self.size else f"other content in them ({found.sha256[:12]})"
        raise DataChanged(
            f"{path}: expected the {self.size} bytes with SHA-256 {self.sha256[:12]} that the run was planned with, "
            f"found {change}: the file has changed since, or differs on this machine; put it back as it was (lines may "
            "be appended), or start a new run with what it is now"
        )


class PinnedStream(_Pin):
    """A dataset that is streamed: its `revision` (a commit, or a hash over a directory's files), and rows if known."""

    revision: str
    rows: int | None

    def check(self, found: PinnedStream, name: str) -> None:
        """Compare with what was `found` under `name`.

        Raises:
            DataChanged: it is another revision.
        """
        if found.revision != self.revision:
            raise DataChanged(
                f"data.prompts: {name}: expected revision {self.revision}, which the run was planned with, found "
                f"{found.revision}: the dataset has changed since, or differs on this machine; put it back as it was, "
                "or start a new run with what it is now"
            )


class PinnedData(_Pin):
    """All data of a run: the prompts, the hold-out file if there is one, what the evaluation decodes, its suites."""

    prompts: PinnedFile | PinnedStream
    holdout: PinnedFile | None = None
    evaluation: PinnedFile | None = None
    suites: dict[str, PinnedFile] = {}


def directory_revision(files: Iterable[Path]) -> str:
    """Return a hash over names and sizes of `files`, and over the first and last megabyte of each."""
    digest = hashlib.sha256()
    for path in sorted(files):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(file.tell(), size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
