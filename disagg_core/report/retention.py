"""Which archives are old enough to go; never one that a registry refers to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from disagg_core.report.archive import ArchiveFacts
from disagg_core.storage.place import Place
from disagg_core.storage.trees import MANIFEST, read_manifest

_DAY_S = 86_400.0


@dataclass(frozen=True)
class KnownArchive:
    """A finished archive below a base, with what its manifest says."""

    place: Place
    facts: ArchiveFacts
    bytes: int


def known_archives(base: Place) -> list[KnownArchive]:
    """Return the finished archives below `base` that say what run they are of."""
    found = []
    for name in base.children():
        place = base.at(name)
        if place.size(MANIFEST) is None:
            continue
        manifest = read_manifest(place)
        if manifest.about:
            found.append(KnownArchive(place, ArchiveFacts.model_validate(manifest.about), manifest.bytes))
    return found


def expired(
    archives: Sequence[KnownArchive], *, last: int, days: float, now: float, referenced: Collection[str]
) -> list[KnownArchive]:
    """Return the archives that may go: older than `days`, and not among the newest `last` of their run name.

    Args:
        archives: all that there are.
        last: how many of each run name are kept, however old.
        days: how old an archive is at least that goes.
        now: seconds since the epoch.
        referenced: ids of the runs whose drafts a registry has; theirs are never returned.
    """
    by_name: dict[str, list[KnownArchive]] = defaultdict(list)
    for archive in sorted(archives, key=lambda archive: archive.facts.created, reverse=True):
        by_name[archive.facts.name].append(archive)
    return [
        archive
        for group in by_name.values()
        for archive in group[last:]
        if now - archive.facts.created > days * _DAY_S and archive.facts.run_id not in referenced
    ]


def remove_archive(archive: KnownArchive) -> None:
    """Remove an archive, its manifest first: what is left if that is cut short does not look whole."""
    archive.place.remove(MANIFEST)
    archive.place.clear()
