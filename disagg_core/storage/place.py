"""A place where files are kept for good: a directory of this machine, or a prefix in a storage that fsspec knows.

`Place` is the whole of what archive and registry ask of a storage. Three promises hold them together:

- **A file is there whole or not at all**: local files are written beside their place, synced, and renamed; object
  stores show an object when it is complete. (A multipart upload that was cut off leaves invisible parts behind; a
  lifecycle rule of the bucket that aborts incomplete multipart uploads removes them.)
- **`create` is exclusive**: of several writers of one name exactly one gets True. Local files are made by link(2),
  which is atomic on NFS as well; S3 writes with ``If-None-Match: *``, Google's and Azure's drivers with their own
  precondition. On any other storage it is fsspec's own ``mode="create"``, which looks first and then writes: two
  writers at the same instant may both believe that they won, so such a storage is for one writer at a time.
- **Errors are ours**: what may succeed when tried again is `StorageFailed`, what the user has to mend is
  `StorageUnusable`, and a missing file is Python's `FileNotFoundError`. A full disk stays the system's own error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec

from disagg_core.errors import BadInput, FailureClass, Transient

BLOCK = 4 * 1024**2
"""Bytes that are held of a file at a time."""
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
_HALF_A_URL = re.compile(r"\w*:/(?!/)|://")
"""What would be taken for a directory, and is meant for a storage."""
_MOUNT_AWAY = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EREMOTEIO, errno.EHOSTDOWN}
"""What a network mount says while its server is away."""
_PROBE = b"draftline was here to see whether it can write"
_PROBE_TIMEOUT_S = 30.0


class StorageUnusable(BadInput):
    """Nothing can be kept at a URL: what was tried and what came of it are named."""


class StorageFailed(Transient):
    """A storage did not do what it was asked for; it may when asked again."""

    failure_class: FailureClass = "infrastructure"


class Place(ABC):
    """Files below one URL, named by relative paths with ``/``."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    @abstractmethod
    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield the content of file `name` in blocks.

        Raises:
            FileNotFoundError: there is none.
        """

    @abstractmethod
    def write(self, name: str, blocks: Iterable[bytes]) -> None:
        """Write file `name`, over one that is there."""

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Write file `name` unless there is one; tell whether it was written. Exclusive, see the module's docstring."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Return the bytes of file `name`, None if there is no such file."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of all files of the place, at any depth, in order."""

    @abstractmethod
    def children(self) -> list[str]:
        """Return the first parts of all files' names, in order."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove file `name`; none need be there."""

    @abstractmethod
    def clear(self) -> None:
        """Remove every file of the place."""

    @abstractmethod
    def at(self, name: str) -> Place:
        """Return the place below this one that is called `name`."""

    @abstractmethod
    def sweep(self) -> None:
        """Remove what killed writers of this place left; nobody may be writing there."""

    def read(self, name: str) -> bytes:
        """Return the content of a small file.

        Raises:
            FileNotFoundError: there is none.
        """
        return b"".join(self.blocks(name))


class LocalPlace(Place):
    """A directory of this machine, made when the first file is written."""

    def __init__(self, root: Path) -> None:
        super().__init__(str(root))
        self.root = root

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield the file's content."""
        with self._translated(name), (self.root / name).open("rb") as file:
            while block := file.read(BLOCK):
                yield block

    def write(self, name: str, blocks: Iterable[bytes]) -> None:
        """Write beside the place, sync, rename."""
        with self._written(name, blocks) as fresh:
            fresh.replace(self.root / name)

    def create(self, name: str, data: bytes) -> bool:
        """Write beside the place and give it its name by a hard link, which fails where the name is taken."""
        with self._written(name, [data]) as fresh:
            try:
                os.link(fresh, self.root / name)
            except FileExistsError:
                return False
        return True

    def size(self, name: str) -> int | None:
        """Return the file's size."""
        path = self.root / name
        return path.stat().st_size if path.is_file() else None

    def names(self) -> list[str]:
        """Return all but the files that are being written, or whose writer was killed."""
        found = (path for path in self.root.rglob("*") if path.is_file() and not _is_unfinished(path))
        return sorted(path.relative_to(self.root).as_posix() for path in found)

    def children(self) -> list[str]:
        """Return files and directories."""
        found = self.root.iterdir() if self.root.is_dir() else ()
        return sorted(path.name for path in found if not _is_unfinished(path))

    def remove(self, name: str) -> None:
        """Unlink the file."""
        with self._translated(name):
            (self.root / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove the directory, with what killed writers left in it."""
        if self.root.is_dir():
            with self._translated(""):
                shutil.rmtree(self.root)

    def sweep(self) -> None:
        """Remove files that were not finished."""
        for path in self.root.rglob(".*.tmp"):
            path.unlink(missing_ok=True)

    def at(self, name: str) -> LocalPlace:
        """Return a directory below this one."""
        return LocalPlace(self.root / name)

    @contextlib.contextmanager
    def _written(self, name: str, blocks: Iterable[bytes]) -> Iterator[Path]:
        path = self.root / name
        fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        with self._translated(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with fresh.open("wb") as file:
                    for block in blocks:
                        file.write(block)
                    file.flush()
                    os.fsync(file.fileno())
                yield fresh
            finally:
                fresh.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise StorageUnusable(f"{self.url}/{name}: {error.strerror}; check the rights to it") from error
        except OSError as error:
            if error.errno not in _MOUNT_AWAY:
                raise
            raise StorageFailed(f"{self.url}/{name}: {error.strerror}") from error


class RemotePlace(Place):
    """A prefix in a storage behind fsspec. Listings are read anew: others write there too."""

    def __init__(self, filesystem: fsspec.AbstractFileSystem, root: str, url: str) -> None:
        super().__init__(url)
        self._filesystem = filesystem
        self._root = root.rstrip("/")

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield the object's content, as it is when opened."""
        with self._translated(name):
            self._filesystem.invalidate_cache()
            with self._filesystem.open(self._path(name), "rb", cache_type="readahead") as file:
                while block := file.read(BLOCK):
                    yield block

    def write(self, name: str, blocks: Iterable[bytes]) -> None:
        """Stream the object to the storage."""
        with self._translated(name):
            self._make_parent(name)
            with self._filesystem.open(self._path(name), "wb") as file:
                for block in blocks:
                    file.write(block)

    def create(self, name: str, data: bytes) -> bool:
        """Write with the storage's precondition that there is no such object."""
        with self._translated(name):
            self._filesystem.invalidate_cache()
            self._make_parent(name)
            try:
                self._filesystem.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
        return True

    def size(self, name: str) -> int | None:
        """Return the object's size."""
        with self._translated(name):
            self._filesystem.invalidate_cache()
            if not self._filesystem.isfile(self._path(name)):
                return None
            return int(self._filesystem.size(self._path(name)))

    def names(self) -> list[str]:
        """Return all objects below the prefix."""
        with self._translated(""):
            self._filesystem.invalidate_cache()
            found = self._filesystem.find(self._root)
            return sorted(str(path).removeprefix(f"{self._root}/") for path in found)

    def children(self) -> list[str]:
        """Return objects and prefixes below the prefix."""
        with self._translated(""):
            self._filesystem.invalidate_cache()
            try:
                found = self._filesystem.ls(self._root, detail=False)
            except FileNotFoundError:
                return []
            return sorted({str(path).rstrip("/").rpartition("/")[2] for path in found})

    def remove(self, name: str) -> None:
        """Remove the object."""
        with self._translated(name), contextlib.suppress(FileNotFoundError):
            self._filesystem.invalidate_cache()
            self._filesystem.rm_file(self._path(name))

    def clear(self) -> None:
        """Remove all objects below the prefix."""
        with self._translated(""), contextlib.suppress(FileNotFoundError):
            self._filesystem.invalidate_cache()
            self._filesystem.rm(self._root, recursive=True)

    def sweep(self) -> None:
        """Do nothing: what is not complete is no object."""

    def at(self, name: str) -> RemotePlace:
        """Return a longer prefix."""
        return RemotePlace(self._filesystem, self._path(name), f"{self.url}/{name}")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _make_parent(self, name: str) -> None:
        self._filesystem.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)

    @contextlib.contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, GeneratorExit, BadInput, Transient):
            raise
        except PermissionError as error:
            raise StorageUnusable(f"{self.url}/{name}: {error}; check the rights to it") from error
        except Exception as error:  # each storage's client has errors of its own
            raise StorageFailed(f"{self.url}/{name}: {type(error).__name__}: {error}") from error


def open_place(url: str) -> Place:
    """Return the place at `url`: a directory, ``file:``, or what an installed driver of fsspec knows.

    Raises:
        StorageUnusable: there is no such protocol, or its driver is not installed.
    """
    if _HALF_A_URL.match(url):
        raise StorageUnusable(f"{url}: expected a directory, or a URL as s3://bucket/path")
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(url.partition("://")[0])
        way_out = f"pip install 'draftline[{extra}]'" if extra else "install it"
        raise StorageUnusable(f"{url}: the driver of this storage is missing ({error}); {way_out}") from error
    except Exception as error:  # each driver has errors of its own; some reach for their server at once
        raise StorageUnusable(
            f"{url}: expected a directory or the URL of a storage that fsspec knows and that is there, found "
            f"{type(error).__name__}: {error}"
        ) from error
    return LocalPlace(Path(root)) if "file" in _protocols(filesystem) else RemotePlace(filesystem, str(root), url)


def probe_place(url: str, timeout_s: float = _PROBE_TIMEOUT_S, *, exclusive: bool = False) -> None:
    """Write a small file below `url`, read it back and delete it; with `exclusive` also see whether `create` is.

    A directory is not made for it: the nearest one above that exists is tried.

    Raises:
        StorageUnusable: one of them does not work, or takes longer than `timeout_s` seconds.
    """
    place = open_place(url)
    if isinstance(place, LocalPlace):
        place = LocalPlace(next(path for path in (place.root, *place.root.parents) if path.exists()))
    failure: list[Exception] = []

    def probe() -> None:
        try:
            _write_and_delete(place)
            if exclusive:
                check_exclusive(place)
        except (StorageUnusable, StorageFailed, OSError) as error:
            failure.append(error)

    # A client tries an address that leads nowhere for minutes, and cannot be told to stop.
    thread = threading.Thread(target=probe, name="storage-probe", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise StorageUnusable(f"{url}: not written to, read and deleted from within {timeout_s:g} s")
    if failure:
        raise StorageUnusable(
            f"{url}: expected to write an object there, read it back and delete it, found {failure[0]}; check the "
            "address and the rights to it"
        ) from failure[0]


def check_exclusive(place: Place) -> None:
    """Check that `place` keeps its promise about `Place.create`: stores that ignore a precondition do not.

    Raises:
        StorageUnusable: a file that was there was written again.
    """
    name = f".draftline-probe-{uuid.uuid4().hex}"
    try:
        made = [place.create(name, _PROBE) for _ in range(2)]
    finally:
        place.remove(name)
    if made != [True, False]:
        raise StorageUnusable(
            f"{place.url}: expected a storage with conditional writes (If-None-Match), found one that writes over what "
            "is there: two who promote at once would both win. Use a newer version of it, or another storage"
        )


def _write_and_delete(place: Place) -> None:
    name = f".draftline-probe-{uuid.uuid4().hex}"
    place.write(name, [_PROBE])
    try:
        found = place.read(name)
    finally:
        place.remove(name)
    if found != _PROBE:
        raise StorageUnusable(f"{place.url}: expected {len(_PROBE)} bytes as they were written, found {len(found)}")


def _is_unfinished(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def _protocols(filesystem: Any) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)
