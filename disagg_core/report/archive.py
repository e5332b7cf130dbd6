"""Archiving what repeats or judges a run, to a directory or any fsspec URL: data first, the manifest last.

An archive is a tree of files in a place (`disagg_core.storage.trees`): every file is sent once, retried, and read back;
an archive without a manifest is an unfinished one. Texts lose their secrets on the way (`storage.redaction`); the run's
own directory is left as it is.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from disagg_core.run_spec.document import ArchiveSection
from disagg_core.settings import Settings
from disagg_core.storage.place import LocalPlace, StorageUnusable, open_place, probe_place
from disagg_core.storage.redaction import redaction_of
from disagg_core.storage.trees import (
    MANIFEST,
    Manifest,
    expand,
    fetch_files,
    read_manifest,
    send_files,
    verify_tree,
    write_manifest,
)

_PROBE_TIMEOUT_S = 30.0


class ArchiveUnusable(StorageUnusable):
    """Nothing can be archived at `archive.url`: what was tried and what came of it are named."""


class ArchiveFacts(BaseModel):
    """What the manifest of an archive says about it, for those who tidy up."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    name: str
    created: float
    complete: bool
    """Whether the training was complete; a failed run's archive has what there was."""
    registry: str | None = None
    """Where the registry is that may refer to the run."""


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
    try:
        place = open_place(url)
    except StorageUnusable as error:
        raise ArchiveUnusable(f"archive.url: {error}") from error
    return place.root if isinstance(place, LocalPlace) else None


def probe_archive(url: str, timeout_s: float = _PROBE_TIMEOUT_S) -> None:
    """Write a small object below `url`, read it back and delete it.

    Raises:
        ArchiveUnusable: one of them does not work, or takes longer than `timeout_s` seconds.
    """
    try:
        probe_place(url, timeout_s)
    except StorageUnusable as error:
        raise ArchiveUnusable(f"archive.url: {error}") from error


def archive_files(sources: dict[str, Path], url: str, facts: ArchiveFacts | None = None) -> Archive:
    """Copy `sources` (archive path to local file or directory) below `url` and write the manifest last.

    The manifest holds size and SHA-256 of every file as it was sent and read back. While an archive that was there
    before is written anew, it is an unfinished one; what it has already is not sent again, and what is no longer part
    of it is removed.

    Raises:
        StorageFailed, StorageUnusable: the storage went on failing, or refused.
    """
    place = open_place(url)
    place.remove(MANIFEST)
    place.sweep()
    files = expand(sources)
    for name in set(place.names()) - set(files):
        place.remove(name)
    about = facts.model_dump(mode="json") if facts is not None else {}
    manifest = Manifest(about=about, files=send_files(place, files, redaction_of))
    write_manifest(place, manifest)
    return _archive(place.url, manifest)


def add_files(sources: dict[str, Path], url: str) -> Archive:
    """Copy more `sources` into the finished archive at `url` and write its manifest again, last.

    Whatever happens while they are copied, the archive is as whole as it was: the manifest there names none of them.

    Raises:
        TreeDamaged: there is no manifest, or it cannot be read.
        ValueError: the archive has one of the files already.
    """
    place = open_place(url)
    manifest = read_manifest(place)
    files = expand(sources)
    known = sorted(set(files) & set(manifest.files))
    if known:
        raise ValueError(f"{url}: expected files that the archive does not have yet, found {known}")
    sent = send_files(place, files, redaction_of)
    grown = manifest.model_copy(update={"files": {**manifest.files, **sent}})
    write_manifest(place, grown)
    return _archive(place.url, grown)


def verify_archive(url: str) -> int:
    """Read every file of the archive at `url`, check it against its manifest, and return how many there are.

    Raises:
        TreeDamaged: there is no manifest, or files are missing or differ; each is named.
    """
    return len(verify_tree(open_place(url)).files)


def fetch_archive(url: str, to: Path, below: str = "") -> Path:
    """Copy the archive at `url`, or its files whose names begin with `below`, to the directory `to`, checked.

    Raises:
        TreeDamaged: there is no manifest, or files are missing or differ.
        BadInput: it has no such files, or there is something else at `to`.
    """
    place = open_place(url)
    files = {name: entry for name, entry in read_manifest(place).files.items() if name.startswith(below)}
    if not files:
        raise StorageUnusable(f"{url}: expected files whose names begin with {below!r}, found none")
    return fetch_files(place, files, to)


def _archive(url: str, manifest: Manifest) -> Archive:
    return Archive(url=url, manifest=f"{url}/{MANIFEST}", files=len(manifest.files), bytes=manifest.bytes)
