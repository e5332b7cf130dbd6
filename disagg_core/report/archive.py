"""Archiving a run's results to a directory or any fsspec URL: data first, the manifest with its hashes last."""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from pydantic import BaseModel, ConfigDict

from disagg_core.errors import BadInput
from disagg_core.run_spec.document import ArchiveSection
from disagg_core.settings import Settings

_PROBE = b"draftline was here to see whether it can write"
_PROBE_TIMEOUT_S = 30.0
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
_CHUNK = 4 * 1024**2
MANIFEST = "manifest.json"
Entry = dict[str, str | int]
"""What the manifest says of a file: its ``sha256`` and its ``bytes``."""


class ArchiveDamaged(BadInput):
    """Archived files are missing or are not what the manifest says; each is named."""


class ArchiveUnusable(BadInput):
    """Nothing can be archived at a URL: what was tried and what came of it are named."""


class Archive(BaseModel):
    """A finished archive: its URL, and the URL of its manifest."""

    model_config = ConfigDict(frozen=True)

    url: str
    manifest: str
    files: int
    bytes: int


def archive_base(section: ArchiveSection, settings: Settings) -> str:
    """Return the directory or URL below which the archives of runs lie."""
    return (section.url or str(settings.home / "archive")).rstrip("/")


def local_directory(url: str) -> Path | None:
    """Return the directory that an archive's URL names on this machine; None if it is elsewhere.

    Raises:
        ArchiveUnusable: there is no such protocol, or its driver is not installed.
    """
    filesystem, root = _filesystem(url)
    return Path(root) if "file" in _protocols(filesystem) else None


def probe_archive(url: str, timeout_s: float = _PROBE_TIMEOUT_S) -> None:
    """Write a small object below `url`, read it back and delete it.

    A directory is not made for it: the nearest one above that exists is tried.

    Raises:
        ArchiveUnusable: one of them does not work, or takes longer than `timeout_s` seconds.
    """
    filesystem, root = _filesystem(url)
    failure: list[Exception] = []

    def probe() -> None:
        try:
            _write_and_delete(filesystem, root)
        except Exception as error:  # noqa: BLE001  # each storage has errors of its own; all mean the same here
            failure.append(error)

    # A client tries an address that leads nowhere for minutes, and cannot be told to stop.
    thread = threading.Thread(target=probe, name="archive-probe", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise ArchiveUnusable(f"archive.url: {url}: not written to, read and deleted from within {timeout_s:g} s")
    if failure:
        said = f"{type(failure[0]).__name__}: {failure[0]}"
        raise ArchiveUnusable(
            f"archive.url: {url}: expected to write an object there, read it back and delete it, found {said}; check "
            "the address and the rights to it"
        ) from failure[0]


def _write_and_delete(filesystem: fsspec.AbstractFileSystem, root: str) -> None:
    if "file" in _protocols(filesystem):
        place = next(str(path) for path in (Path(root), *Path(root).parents) if path.exists())
    else:
        filesystem.makedirs(root, exist_ok=True)
        place = root
    name = f"{place.rstrip('/')}/.draftline-probe-{uuid.uuid4().hex}"
    filesystem.pipe_file(name, _PROBE)
    try:
        found = filesystem.cat_file(name)
    finally:
        filesystem.rm_file(name)
    if found != _PROBE:
        raise ArchiveUnusable(f"expected {len(_PROBE)} bytes as they were written, found {len(found)} others")


def _filesystem(url: str) -> tuple[Any, str]:
    """Return the filesystem of `url` and the path of `url` in it."""
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        extra = _EXTRAS.get(url.partition("://")[0])
        way_out = f"pip install 'draftline[{extra}]'" if extra else "install it"
        raise ArchiveUnusable(
            f"archive.url: {url}: the driver of this storage is missing ({error}); {way_out}"
        ) from error
    except ValueError as error:
        raise ArchiveUnusable(
            f"archive.url: {url}: expected a directory or the URL of a storage that fsspec knows, found: {error}"
        ) from error
    return filesystem, str(root)


def _protocols(filesystem: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    protocol = filesystem.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def archive_files(sources: dict[str, Path], url: str) -> Archive:
    """Copy `sources` (archive path to local file or directory) below `url` and write the manifest last.

    The manifest holds size and SHA-256 of every file as it was read while copying, so an archive without a manifest
    is an unfinished one: also while one that was there before is written anew.
    """
    filesystem, root = fsspec.core.url_to_fs(url)
    if filesystem.exists(f"{root}/{MANIFEST}"):
        filesystem.rm(f"{root}/{MANIFEST}")
    return _write_manifest(filesystem, root, url, _copy(filesystem, root, sources))


def add_files(sources: dict[str, Path], url: str) -> Archive:
    """Copy more `sources` into the finished archive at `url` and write its manifest again, last.

    Whatever happens while they are copied, the archive is as whole as it was: the manifest there names none of them.

    Raises:
        ArchiveDamaged: there is no manifest, or it cannot be read.
        ValueError: the archive has one of the files already.
    """
    filesystem, root = fsspec.core.url_to_fs(url)
    files = _read_manifest(filesystem, root, url)
    known = sorted(name for name, _ in _expand(sources) if name in files)
    if known:
        raise ValueError(f"{url}: expected files that the archive does not have yet, found {known}")
    return _write_manifest(filesystem, root, url, files | _copy(filesystem, root, sources))


def verify_archive(url: str) -> int:
    """Check every file of the archive at `url` against its manifest and return how many there are.

    Raises:
        ArchiveDamaged: there is no manifest, or files are missing or differ; each is named.
    """
    filesystem, root = fsspec.core.url_to_fs(url)
    files = _read_manifest(filesystem, root, url)
    found = ((name, _damage(filesystem, f"{root}/{name}", entry)) for name, entry in files.items())
    damaged = [f"{name}: {damage}" for name, damage in found if damage]
    if damaged:
        raise ArchiveDamaged(f"{url}: {len(damaged)} of {len(files)} files are damaged:\n" + "\n".join(damaged))
    return len(files)


def _copy(filesystem: fsspec.AbstractFileSystem, root: str, sources: dict[str, Path]) -> dict[str, Entry]:
    """Copy `sources` below `root` and return the manifest's entry of every file."""
    files: dict[str, Entry] = {}
    for name, path in sorted(_expand(sources)):
        target = f"{root}/{name}"
        filesystem.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as source, filesystem.open(target, "wb") as out:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                out.write(chunk)
        files[name] = {"sha256": digest.hexdigest(), "bytes": size}
    return files


def _write_manifest(filesystem: fsspec.AbstractFileSystem, root: str, url: str, files: dict[str, Entry]) -> Archive:
    with filesystem.open(f"{root}/{MANIFEST}", "wb") as out:
        out.write(json.dumps({"version": 1, "files": files}, indent=2, sort_keys=True).encode())
    total = sum(int(entry["bytes"]) for entry in files.values())
    return Archive(url=url, manifest=f"{url.rstrip('/')}/{MANIFEST}", files=len(files), bytes=total)


def _read_manifest(filesystem: fsspec.AbstractFileSystem, root: str, url: str) -> dict[str, Entry]:
    if not filesystem.exists(f"{root}/{MANIFEST}"):
        raise ArchiveDamaged(f"{url}: no {MANIFEST}; the archive was not finished")
    with filesystem.open(f"{root}/{MANIFEST}", "rb") as file:
        try:
            files: dict[str, Entry] = json.load(file)["files"]
        except (ValueError, KeyError) as error:
            raise ArchiveDamaged(f"{url}: {MANIFEST} cannot be read ({error})") from error
    return files


def _damage(filesystem: fsspec.AbstractFileSystem, path: str, entry: Entry) -> str | None:
    """Return how the file at `path` differs from its `entry` in the manifest; None if it does not."""
    if not filesystem.exists(path):
        return "missing"
    digest, size = hashlib.sha256(), 0
    with filesystem.open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    if size != entry["bytes"]:
        return f"expected {entry['bytes']} bytes, found {size}"
    if digest.hexdigest() != entry["sha256"]:
        return f"expected sha256 {entry['sha256']}, found {digest.hexdigest()}"
    return None


def _expand(sources: dict[str, Path]) -> Iterator[tuple[str, Path]]:
    for name, path in sources.items():
        if path.is_dir():
            for file in path.rglob("*"):
                if file.is_file():
                    yield f"{name}/{file.relative_to(path)}", file
        elif path.is_file():
            yield name, path
