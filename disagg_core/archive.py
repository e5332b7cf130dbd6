"""Archiving a run's results to a directory or any fsspec URL: data first, the manifest with its hashes last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
from pydantic import BaseModel, ConfigDict

from disagg_core.errors import BadInput

_CHUNK = 4 * 1024**2
MANIFEST = "manifest.json"


class ArchiveDamaged(BadInput):
    """Archived files are missing or are not what the manifest says; each is named."""


class Archive(BaseModel):
    """A finished archive: its URL, and the URL of its manifest."""

    model_config = ConfigDict(frozen=True)

    url: str
    manifest: str
    files: int
    bytes: int


def archive_files(sources: dict[str, Path], url: str) -> Archive:
    """Copy `sources` (archive path to local file or directory) below `url` and write the manifest last.

    The manifest holds size and SHA-256 of every file as it was read while copying, so an archive without a manifest
    is an unfinished one: also while one that was there before is written anew.
    """
    filesystem, root = fsspec.core.url_to_fs(url)
    if filesystem.exists(f"{root}/{MANIFEST}"):
        filesystem.rm(f"{root}/{MANIFEST}")
    files: dict[str, dict[str, str | int]] = {}
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
    with filesystem.open(f"{root}/{MANIFEST}", "wb") as out:
        out.write(json.dumps({"version": 1, "files": files}, indent=2, sort_keys=True).encode())
    total = sum(int(entry["bytes"]) for entry in files.values())
    return Archive(url=url, manifest=f"{url.rstrip('/')}/{MANIFEST}", files=len(files), bytes=total)


def verify_archive(url: str) -> int:
    """Check every file of the archive at `url` against its manifest and return how many there are.

    Raises:
        ArchiveDamaged: there is no manifest, or files are missing or differ; each is named.
    """
    filesystem, root = fsspec.core.url_to_fs(url)
    if not filesystem.exists(f"{root}/{MANIFEST}"):
        raise ArchiveDamaged(f"{url}: no {MANIFEST}; the archive was not finished")
    with filesystem.open(f"{root}/{MANIFEST}", "rb") as file:
        try:
            files = json.load(file)["files"]
        except (ValueError, KeyError) as error:
            raise ArchiveDamaged(f"{url}: {MANIFEST} cannot be read ({error})") from error
    found = ((name, _damage(filesystem, f"{root}/{name}", entry)) for name, entry in files.items())
    damaged = [f"{name}: {damage}" for name, damage in found if damage]
    if damaged:
        raise ArchiveDamaged(f"{url}: {len(damaged)} of {len(files)} files are damaged:\n" + "\n".join(damaged))
    return len(files)


def _damage(filesystem: fsspec.AbstractFileSystem, path: str, entry: dict[str, str | int]) -> str | None:
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
