"""Tidying up archives without losing one that a registry refers to."""

from __future__ import annotations

import time
from collections.abc import Iterable

from disagg_core.registry.registry import Registry, targets_of
from disagg_core.report.retention import KnownArchive, expired, known_archives, remove_archive
from disagg_core.storage.place import open_place


def retained_runs(urls: Iterable[str | None]) -> set[str]:
    """Return the ids of all runs whose drafts are kept, or being published, in the registries at `urls`.

    Raises:
        StorageFailed, StorageUnusable: one of them cannot be read; nothing can be said then.
    """
    found: set[str] = set()
    for url in {url for url in urls if url is not None}:
        place = open_place(url)
        for target in targets_of(place):
            found |= Registry(place, target).runs()
    return found


def prune(base: str, *, last: int, days: float, also: Iterable[str] = (), remove: bool = True) -> list[KnownArchive]:
    """Remove the archives below `base` that may go (see `expired`), or only return them.

    What the registries refer to stays: those that the archives' runs name, and those at the URLs in `also`.

    Raises:
        StorageFailed, StorageUnusable, TreeDamaged: an archive or a registry cannot be read; nothing is removed then.
    """
    archives = known_archives(open_place(base))
    referenced = retained_runs([*also, *(archive.facts.registry for archive in archives)])
    gone = expired(archives, last=last, days=days, now=time.time(), referenced=referenced)
    for archive in gone if remove else ():
        remove_archive(archive)
    return gone
