"""The registry of one target's drafts, in any place that keeps files.

::

    <url>/<target>/
      claims/<number>.json               whose version this is; made exclusively, before it
      versions/<number>/checkpoint/      the draft in fp32, to continue from
      versions/<number>/export/<format>/ what serving engines load
      versions/<number>/report/          report, accounting, evaluation
      versions/<number>/manifest.json    provenance, sizes and hashes; written last
      history/<number>.json              moves of the champion, one file each, made exclusively
      watch/<condition>.json             what the watch has told of a condition that lasts

**A version is whole when its manifest is there**, and does not change afterwards. A number belongs to one draft of one
run: an upload that was killed is finished, or replaced, by the next one of that run.

**The champion is what the last event of the history says.** To move it is to create the next event's file, which
succeeds for one writer only (see `Place.create`): compare and swap, pointer and history in one write, without a lock
that a killed process could leave behind.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from disagg_core.errors import BadInput
from disagg_core.registry.versions import (
    ChampionMoved,
    Event,
    EventKind,
    NothingToRollBack,
    Provenance,
    UnknownVersion,
    Version,
    VersionExists,
    champions_of,
)
from disagg_core.storage.place import Place, check_exclusive
from disagg_core.storage.trees import (
    MANIFEST,
    Entry,
    Manifest,
    expand,
    fetch_files,
    read_manifest,
    send_files,
    verify_tree,
    write_manifest,
)

CHECKPOINT = "checkpoint"
EXPORT = "export"
REPORT = "report"


def whoami() -> str:
    """Return who moves the champion from this process: user and host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


class Registry:
    """Versions and champion of the drafts of the target called `name`, below `place`."""

    def __init__(self, place: Place, name: str) -> None:
        self.name = name
        self.place = place.at(name)
        self._versions = self.place.at("versions")
        self._claims = self.place.at("claims")
        self._history = self.place.at("history")

    # --- versions -----------------------------------------------------------------------------------------------------

    def publish(self, sources: Mapping[str, Path], provenance: Provenance) -> Version:
        """Keep a run's draft as a version: `sources` are files and directories by their names in it.

        A version of the same draft of the same run that is whole is returned as it is; one that is not is finished.

        Raises:
            VersionExists: there is a whole one whose checkpoint is another.
            StorageFailed: the storage went on failing.
        """
        files = expand(sources)
        number = self._claim(provenance)
        place = self.place_of(number)
        if place.size(MANIFEST) is not None:
            manifest = read_manifest(place)
            self._check_same(number, manifest, files)
            return _version(number, manifest)
        place.sweep()
        for name in set(place.names()) - set(files):
            place.remove(name)
        manifest = Manifest(about=provenance.model_dump(mode="json"), files=send_files(place, files))
        write_manifest(place, manifest)
        return _version(number, manifest)

    def versions(self) -> list[Version]:
        """Return all whole versions, the oldest first."""
        return [_version(number, read_manifest(self.place_of(number))) for number in self._whole()]

    def unfinished(self) -> dict[int, str]:
        """Return the ids of the runs whose versions were begun and not finished, by number."""
        whole = set(self._whole())
        return {number: self._claimant(number)[0] for number in self._numbers() if number not in whole}

    def runs(self) -> set[str]:
        """Return the ids of the runs whose drafts are versions, or begun ones."""
        return {self._claimant(number)[0] for number in self._numbers()}

    def version(self, number: int) -> Version:
        """Return version `number`.

        Raises:
            UnknownVersion: there is none, or it was not finished.
        """
        return _version(number, self._manifest(number))

    def of_run(self, run_id: str) -> Version | None:
        """Return the newest version of the run whose id is `run_id`, or the only one whose id begins with it.

        Raises:
            UnknownVersion: it is the beginning of several runs' ids.
        """
        versions = self.versions()
        ids = {version.provenance.run_id for version in versions}
        found = {run_id} & ids or {known for known in ids if run_id and known.startswith(run_id)}
        if len(found) > 1:
            raise UnknownVersion(
                f"{run_id!r} is the beginning of {len(found)} runs in {self.place.url}: {sorted(found)}"
            )
        return next((version for version in reversed(versions) if version.provenance.run_id in found), None)

    def files_of(self, number: int, part: str) -> dict[str, Entry]:
        """Return the files of a part of version `number`, such as ``checkpoint`` or ``export/sglang``, by full name.

        Raises:
            UnknownVersion: there is no such version, or it has no such part.
        """
        files = {name: entry for name, entry in self._manifest(number).files.items() if name.startswith(f"{part}/")}
        if not files:
            raise UnknownVersion(f"v{number} of {self.place.url}: expected a part {part}, found none")
        return files

    def fetch(self, number: int, part: str, to: Path) -> Path:
        """Copy a part of version `number` to the directory `to`, checked, and return it; see `fetch_files`.

        Raises:
            UnknownVersion, TreeDamaged, BadInput: see `files_of` and `fetch_files`.
        """
        place = self.place_of(number)
        return fetch_files(place, self.files_of(number, part), to, without=f"{part}/")

    def verify(self, number: int) -> Version:
        """Read all files of version `number` and compare them with its manifest.

        Raises:
            UnknownVersion, TreeDamaged: there is none; files are missing or differ.
        """
        self._manifest(number)
        return _version(number, verify_tree(self.place_of(number)))

    def place_of(self, number: int) -> Place:
        """Return the place of version `number`."""
        return self._versions.at(_padded(number))

    def url_of(self, number: int) -> str:
        """Return the URL of version `number`."""
        return self.place_of(number).url

    # --- champion -----------------------------------------------------------------------------------------------------

    def history(self) -> list[Event]:
        """Return all moves of the champion, the oldest first."""
        return [Event.model_validate_json(self._history.read(name)) for name in self._history.children()]

    def champion(self) -> Version | None:
        """Return the champion; None before the first promotion."""
        events = self.history()
        return self.version(events[-1].version) if events else None

    def promote(self, number: int, *, instead_of: int | None, by: str, reason: str = "") -> Event:
        """Make version `number` the champion, in place of `instead_of` (None: there was none).

        Raises:
            ChampionMoved: the champion is another by now; who moved it is named.
            UnknownVersion: there is no whole version `number`.
            StorageUnusable: the storage has no conditional writes.
        """
        self._manifest(number)
        return self._move("promoted", number, instead_of, by, reason)

    def rollback(self, *, by: str, to: int | None = None, reason: str = "") -> Event:
        """Make the champion before the present one, or version `to`, the champion again.

        Raises:
            NothingToRollBack: there was none before.
            ChampionMoved: somebody else moved it meanwhile.
            UnknownVersion: there is no whole version `to`.
        """
        champions = champions_of(self.history())
        if to is None and len(champions) < 2:
            present = f"v{champions[0]}, the only one so far" if champions else "none"
            raise NothingToRollBack(f"{self.place.url}: expected a champion before the present one, found {present}")
        number = champions[-2] if to is None else to
        self._manifest(number)
        return self._move("rolled_back", number, champions[-1] if champions else None, by, reason)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _move(self, kind: EventKind, number: int, instead_of: int | None, by: str, reason: str) -> Event:
        """Append an event, if the champion is still `instead_of`."""
        check_exclusive(self.place)
        events = self.history()
        while True:
            last = events[-1] if events else None
            present = last.version if last else None
            if present != instead_of:
                raise ChampionMoved(_moved(self.place.url, number, instead_of, last), last)
            event = Event(
                number=last.number + 1 if last else 1,
                kind=kind,
                version=number,
                previous=present,
                at=time.time(),
                by=by,
                reason=reason,
                token=uuid.uuid4().hex,
            )
            name = f"{event.number:08d}.json"
            if self._history.create(name, event.model_dump_json(indent=2).encode()):
                return event
            events = self.history()
            if event in events:  # the storage's client had asked twice, and its first answer was lost
                return event

    def _claim(self, provenance: Provenance) -> int:
        """Return the number of this draft's version: the one that it has, or the next free one."""
        owner = (provenance.run_id, provenance.draft)
        numbers = self._numbers()
        known = [number for number in numbers if self._claimant(number) == owner]
        if known:
            return known[0]
        number = max(numbers, default=0) + 1
        claim = json.dumps({"run_id": owner[0], "draft": owner[1], "by": whoami(), "at": time.time()}).encode()
        while not self._claims.create(f"{_padded(number)}.json", claim) and self._claimant(number) != owner:
            number += 1
        return number

    def _check_same(self, number: int, manifest: Manifest, files: Mapping[str, Path]) -> None:
        other = [
            name
            for name, path in files.items()
            if name.startswith(f"{CHECKPOINT}/") and manifest.files.get(name) != Entry.of_file(path)
        ]
        if other:
            raise VersionExists(
                f"{self.place.url}: v{number} is this run's already, with other content of {', '.join(other)}; "
                "versions do not change: publish under another run.name"
            )

    def _numbers(self) -> list[int]:
        """Return the numbers of all versions that were begun."""
        return [int(name.removesuffix(".json")) for name in self._claims.children()]

    def _claimant(self, number: int) -> tuple[str, str]:
        """Return run and draft that version `number` belongs to."""
        claim = json.loads(self._claims.read(f"{_padded(number)}.json"))
        return claim["run_id"], claim["draft"]

    def _whole(self) -> list[int]:
        return [number for number in self._numbers() if self.place_of(number).size(MANIFEST) is not None]

    def _manifest(self, number: int) -> Manifest:
        place = self.place_of(number)
        if place.size(MANIFEST) is None:
            known = ", ".join(f"v{known}" for known in self._whole())
            raise UnknownVersion(f"{self.place.url}: no version v{number}; there are: {known or 'none'}")
        return read_manifest(place)


def targets_of(place: Place) -> list[str]:
    """Return the names of the targets whose drafts are kept below `place`."""
    return [name for name in place.children() if not name.startswith(".")]


def the_target_of(place: Place, name: str | None) -> str:
    """Return `name`, or the only target whose drafts are kept below `place`.

    Raises:
        BadInput: there is no such target, or more than one to choose from.
    """
    known = targets_of(place)
    if name is None and len(known) == 1:
        return known[0]
    if name is None or name not in known:
        raise BadInput(
            f"{place.url}: expected the name of one of its targets, found {name}; {known or 'there are none'}"
        )
    return name


def _moved(url: str, number: int, instead_of: int | None, last: Event | None) -> str:
    expected = "none" if instead_of is None else f"v{instead_of}"
    found = last.describe() if last is not None else "there is none"
    return (
        f"{url}: v{number} was to take the place of {expected}, but {found}; compare it with that one "
        "(draftline drafts diff), and promote it again if it is still the better one"
    )


def _padded(number: int) -> str:
    return f"{number:06d}"


def _version(number: int, manifest: Manifest) -> Version:
    return Version(
        number=number,
        provenance=Provenance.model_validate(manifest.about),
        content=manifest.content_hash(),
        bytes=manifest.bytes,
        files=len(manifest.files),
    )
