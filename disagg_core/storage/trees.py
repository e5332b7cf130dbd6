"""Trees of files in a place: data first, the manifest last, everything read back.

A tree is whole when its manifest is there: whatever ends an upload before, a reader finds none, and the next upload
sends only what is not there yet. Nothing is trusted to have arrived: each file is read back and hashed after it was
sent, and so is the manifest. Memory holds a few blocks of a file, never a file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from disagg_core.errors import BadInput
from disagg_core.processes.retry import Retry
from disagg_core.storage.place import BLOCK, Place, StorageFailed

MANIFEST = "manifest.json"
RETRY_S = 120.0
"""How long one file is tried for when the storage fails."""
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0

Source = Path | bytes
"""What a file of a tree is made of: a file of this machine, or content."""
Blocks = Iterable[bytes]
"""The content of a file, piece by piece."""
Filter = Callable[[Blocks], Blocks]
"""Changes the content of a file on its way to the storage."""
log = logging.getLogger(__name__)


class TreeDamaged(BadInput):
    """Files of a tree are missing or are not what the manifest says, or it has none; each is named."""


class Entry(BaseModel):
    """What the manifest says of a file."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    sha256: str

    @classmethod
    def of(cls, blocks: Blocks) -> Entry:
        """Return the entry of a file with the content `blocks`."""
        digest, size = hashlib.sha256(), 0
        for block in blocks:
            digest.update(block)
            size += len(block)
        return cls(bytes=size, sha256=digest.hexdigest())

    @classmethod
    def of_file(cls, path: Path) -> Entry:
        """Return the entry of a file of this machine."""
        return cls.of(_blocks(path))


class Manifest(BaseModel):
    """The files of a whole tree by name; `about` says what the tree is, as plain JSON values."""

    model_config = ConfigDict(frozen=True)

    version: int = 1
    about: dict[str, Any] = {}
    files: dict[str, Entry]

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.bytes for entry in self.files.values())

    def content_hash(self, below: str = "") -> str:
        """Return a hash over names and contents of the files whose names begin with `below`."""
        named = {name: entry.sha256 for name, entry in self.files.items() if name.startswith(below)}
        return hashlib.sha256("\n".join(f"{name}:{named[name]}" for name in sorted(named)).encode()).hexdigest()


def expand(sources: Mapping[str, Path]) -> dict[str, Path]:
    """Return every file of `sources`, a name for each file or directory; what does not exist is left out."""
    found: dict[str, Path] = {}
    for name, path in sources.items():
        if path.is_dir():
            files = (file for file in path.rglob("*") if file.is_file())
            found |= {f"{name}/{file.relative_to(path).as_posix()}": file for file in files}
        elif path.is_file():
            found[name] = path
    return dict(sorted(found.items()))


def send_files(
    place: Place, sources: Mapping[str, Source], changed: Callable[[str], Filter | None] = lambda name: None
) -> dict[str, Entry]:
    """Send `sources` to `place`, each retried and read back, and return their entries.

    What is there already with the same size and hash is not sent again. `changed` gives the filter of a file's content
    by its name, None where it is sent as it is.

    Raises:
        StorageFailed: the storage went on failing for `RETRY_S` with one file.
    """
    return {name: _retried(place)(_send, place, name, source, changed(name)) for name, source in sources.items()}


def write_manifest(place: Place, manifest: Manifest) -> None:
    """Write the manifest, over an older one, and read it back.

    Raises:
        StorageFailed: the storage went on failing for `RETRY_S`.
    """
    _retried(place)(_send, place, MANIFEST, manifest.model_dump_json(indent=2).encode(), None)


def read_manifest(place: Place) -> Manifest:
    """Return the manifest of the tree at `place`.

    Raises:
        TreeDamaged: there is none, or it cannot be read.
    """
    try:
        return Manifest.model_validate_json(_retried(place)(place.read, MANIFEST))
    except FileNotFoundError:
        raise TreeDamaged(f"{place.url}: no {MANIFEST}; it was not finished") from None
    except ValidationError as error:
        raise TreeDamaged(f"{place.url}: {MANIFEST} cannot be read ({error.errors()[0]['msg']})") from error


def verify_tree(place: Place, below: str = "") -> Manifest:
    """Read every file of the tree whose name begins with `below`, compare it with the manifest, and return that.

    Raises:
        TreeDamaged: there is no manifest, or files are missing or differ; each is named.
    """
    manifest = read_manifest(place)
    named = {name: entry for name, entry in manifest.files.items() if name.startswith(below)}
    retried = _retried(place)
    found = ((name, retried(_damage, place, name, entry)) for name, entry in named.items())
    damaged = [f"{name}: {damage}" for name, damage in found if damage]
    if damaged:
        raise TreeDamaged(f"{place.url}: {len(damaged)} of {len(named)} files are damaged:\n" + "\n".join(damaged))
    return manifest


def fetch_files(place: Place, files: Mapping[str, Entry], to: Path, without: str = "") -> Path:
    """Copy `files` of the tree at `place` into the directory `to`, checked, and return it.

    `without` is taken off the front of their names. The directory appears whole, by a rename; one that is there already
    is taken if it holds these files and nothing else.

    Raises:
        TreeDamaged: a file is missing or not what its entry says.
        BadInput: there is something else than an earlier copy at `to`.
    """
    named = {name.removeprefix(without): (name, entry) for name, entry in files.items()}
    copy = {name: entry for name, (_, entry) in named.items()}
    if to.exists() and is_copy(to, copy):
        return to
    if to.exists():
        raise BadInput(f"{to}: expected no directory, or an undamaged copy of {place.url}; remove it to fetch it again")
    fresh = to.with_name(f".{to.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        for name, (source, entry) in named.items():
            _retried(place)(_receive, place, source, entry, fresh / name)
        try:
            fresh.rename(to)
        except OSError:  # another process was faster
            if not is_copy(to, copy):
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return to


def is_copy(directory: Path, files: Mapping[str, Entry]) -> bool:
    """Tell whether `directory` holds just these `files`, undamaged."""
    there = set(expand({"": directory}))
    if {name.removeprefix("/") for name in there} != set(files):
        return False
    return all(Entry.of_file(directory / name) == entry for name, entry in files.items())


def _receive(place: Place, name: str, entry: Entry, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("wb") as file:
            found = Entry.of(_teed(place.blocks(name), file.write))
            file.flush()
            os.fsync(file.fileno())
    except FileNotFoundError:
        raise TreeDamaged(f"{place.url}: {name}: missing") from None
    if damage := _difference(entry, found):
        raise TreeDamaged(f"{place.url}: {name}: {damage}")


def _send(place: Place, name: str, source: Source, changed: Filter | None) -> Entry:
    """Send one file unless it is there, and return its entry; the file may grow meanwhile."""

    def content() -> Blocks:
        blocks = [source] if isinstance(source, bytes) else _blocks(source)
        return blocks if changed is None else changed(blocks)

    size = place.size(name)
    if size is not None:
        wanted = Entry.of(content())
        if size == wanted.bytes and Entry.of(place.blocks(name)) == wanted:
            return wanted
    digest, total = hashlib.sha256(), 0

    def counted() -> Iterator[bytes]:
        nonlocal total
        for block in content():
            digest.update(block)
            total += len(block)
            yield block

    place.write(name, counted())
    sent = Entry(bytes=total, sha256=digest.hexdigest())
    if damage := _damage(place, name, sent):
        raise StorageFailed(f"{place.url}/{name}: not what was sent: {damage}")
    return sent


def _damage(place: Place, name: str, entry: Entry) -> str | None:
    """Return how file `name` differs from its `entry`; None if it does not."""
    try:
        found = Entry.of(place.blocks(name))
    except FileNotFoundError:
        return "missing"
    return _difference(entry, found)


def _difference(entry: Entry, found: Entry) -> str | None:
    if found.bytes != entry.bytes:
        return f"expected {entry.bytes} bytes, found {found.bytes}"
    if found.sha256 != entry.sha256:
        return f"expected sha256 {entry.sha256}, found {found.sha256}"
    return None


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def _teed(blocks: Blocks, write: Callable[[bytes], object]) -> Iterator[bytes]:
    for block in blocks:
        write(block)
        yield block


def _retried(place: Place) -> Retry:
    what = f"the storage {place.url}"
    return Retry(StorageFailed, budget_s=RETRY_S, every_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S, what=what)
