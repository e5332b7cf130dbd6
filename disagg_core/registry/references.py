"""What people call a draft, resolved to a directory: one way for run documents and for the command line.

=========================== =========================================================================================
reference                   the draft
=========================== =========================================================================================
``champion``, ``latest``    of the registry: the one in service, the newest version
``v3``, ``3``               version 3 of the registry
``./dir``, ``/dir``         a directory: a draft's, or a run's, an archive's or a version's, whose newest draft it is
``scheme://...``            the same, in any storage that fsspec knows
a run's id, or its start    the registry's version of that run, else its newest checkpoint on this machine
``org/name``, ``@revision`` a draft on the Hugging Face hub
=========================== =========================================================================================

What is not on this machine is fetched to a cache, under the hash of its content, and checked there at every use.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from disagg_core.drafts.export import CONFIG
from disagg_core.errors import BadInput
from disagg_core.registry.registry import CHECKPOINT, Registry
from disagg_core.registry.versions import UnknownVersion, Version, number_of
from disagg_core.run.directory import RunDir
from disagg_core.run.known import find_run, known_runs
from disagg_core.run_spec.document import RegistrySection, RunSpec
from disagg_core.run_spec.section import is_local
from disagg_core.settings import Settings
from disagg_core.storage.place import LocalPlace, Place, open_place
from disagg_core.storage.trees import MANIFEST, Entry, Manifest, fetch_files, is_copy, read_manifest
from disagg_core.training.checkpoint import newest_complete

CHAMPION = "champion"
LATEST = "latest"
_DRAFT_FILES = ("config.json", "draft.safetensors", "model*.safetensors", "model.safetensors.index.json")
_STEP = re.compile(r"^(checkpoints/step-(\d+))/config\.json$")
_HUB_ID = re.compile(r"^(?:hf:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?$")


class UnknownDraft(BadInput):
    """A reference means no draft: what it was taken for is named, and what there is."""


@dataclass(frozen=True)
class FoundDraft:
    """A draft on this machine; `pinned` is a reference that means this very draft for ever."""

    path: Path
    pinned: str
    version: Version | None = None


def registry_url(section: RegistrySection, settings: Settings) -> str:
    """Return where the registry of a run is."""
    return section.url or settings.registry or str(settings.home / "registry")


def registry_name(spec: RunSpec) -> str:
    """Return the target's name in the registry: the document's, or one made of the model's."""
    model = spec.target.model
    named = Path(model).name if is_local(model) else model.replace("/", "--")
    return spec.registry.name or re.sub(r"[^A-Za-z0-9._-]+", "-", named).lstrip("._-") or "target"


def open_registry(spec: RunSpec, settings: Settings) -> Registry:
    """Return the registry of the run document's target.

    Raises:
        StorageUnusable: its URL cannot be used.
    """
    return Registry(open_place(registry_url(spec.registry, settings)), registry_name(spec))


class References:
    """Finds drafts by what people call them; see the module's docstring."""

    def __init__(self, registry: Registry, *, runs: Path, cache: Path) -> None:
        self._registry = registry
        self._runs = runs
        self._cache = cache

    @classmethod
    def of(cls, spec: RunSpec, settings: Settings) -> References:
        """Return what references mean in a run document, on this machine.

        Raises:
            StorageUnusable: the URL of the registry cannot be used.
        """
        return cls(open_registry(spec, settings), runs=settings.runs_dir, cache=settings.drafts_cache)

    def find(self, reference: str) -> FoundDraft:
        """Return the draft that `reference` means, on this machine.

        Raises:
            UnknownDraft, UnknownVersion: there is none.
            TreeDamaged: its files are not what its manifest says.
            StorageFailed, StorageUnusable: where it is does not answer.
        """
        if reference in (CHAMPION, LATEST) or number_of(reference) is not None:
            return self._of_version(self.version(reference))
        if "://" in reference or reference.startswith("file:"):
            return self._of_place(open_place(reference))
        if is_local(reference) or Path(reference).is_dir():
            return self._of_place(LocalPlace(Path(reference).expanduser().absolute()))
        version = self._registry.of_run(reference)
        if version is not None:
            return self._of_version(version)
        hub = _HUB_ID.match(reference)
        if hub is not None:
            return _of_hub(hub[1], hub[2])
        return self._of_run(reference)

    def version(self, reference: str) -> Version:
        """Return the version that ``champion``, ``latest``, a number or a run's id means.

        Raises:
            UnknownVersion: there is none; what there is is named.
        """
        number = number_of(reference)
        if number is not None:
            return self._registry.version(number)
        if reference == CHAMPION:
            found = self._registry.champion()
        elif reference == LATEST:
            found = next(reversed(self._registry.versions()), None)
        else:
            found = self._registry.of_run(reference)
        if found is None:
            known = ", ".join(f"{v.label} ({v.provenance.run_id})" for v in self._registry.versions())
            raise UnknownVersion(f"{self._registry.place.url}: no {reference}; its versions: {known or 'none'}")
        return found

    def _of_version(self, version: Version) -> FoundDraft:
        files = self._registry.files_of(version.number, CHECKPOINT)
        path = self._cached(self._registry.place_of(version.number), files, f"{CHECKPOINT}/")
        return FoundDraft(path, self._registry.url_of(version.number), version)

    def _of_place(self, place: Place) -> FoundDraft:
        """Return the draft at a directory or URL, fetched unless it is one of this machine without a manifest."""
        whole = place.size(CONFIG) is not None
        if isinstance(place, LocalPlace):
            if not whole and (newest := newest_complete(place.root / "checkpoints")) is not None:
                return FoundDraft(newest, str(newest))
            if whole or place.size(MANIFEST) is None:
                return FoundDraft(place.root, str(place.root))
        elif whole:
            names = [name for name in place.names() if _is_of_a_draft(name)]
            files = {name: Entry.of(place.blocks(name)) for name in names}
            return FoundDraft(self._cached(place, files, ""), place.url)
        if place.size(MANIFEST) is None:
            raise UnknownDraft(
                f"{place.url}: expected a draft ({CONFIG} and weights), or an archive or a version of a registry with "
                "one, found neither"
            )
        manifest = read_manifest(place)
        prefix = _newest_draft(manifest, place)
        return FoundDraft(self._cached(place, manifest.files, prefix), place.url)

    def _cached(self, place: Place, files: Mapping[str, Entry], prefix: str) -> Path:
        """Return the directory in the cache that holds the draft's `files`, whose names begin with `prefix`."""
        wanted = {
            name: entry
            for name, entry in files.items()
            if name.startswith(prefix) and _is_of_a_draft(name.removeprefix(prefix))
        }
        local = {name.removeprefix(prefix): entry for name, entry in wanted.items()}
        path = self._cache / Manifest(files=local).content_hash()[:24]
        if path.exists() and not is_copy(path, local):
            shutil.rmtree(path)
        self._cache.mkdir(parents=True, exist_ok=True)
        return fetch_files(place, wanted, path, without=prefix)

    def _of_run(self, reference: str) -> FoundDraft:
        known = [run.run_id for run in known_runs(self._runs)]
        if not any(run_id.startswith(reference) for run_id in known):
            raise UnknownDraft(
                f"{reference}: expected champion, latest, a version such as v3, a run's id, a directory (it starts "
                f"with ./, ../, / or ~), a Hugging Face id or a URL; runs in {self._runs}: {', '.join(known) or 'none'}"
            )
        run = find_run(self._runs, reference)
        return FoundDraft(path := _newest_of(run), str(path))


def _newest_of(run: RunDir) -> Path:
    newest = newest_complete(run.checkpoints)
    if newest is None:
        raise UnknownDraft(f"run {run.run_id} has no whole checkpoint in {run.checkpoints}")
    return newest


def _newest_draft(manifest: Manifest, place: Place) -> str:
    """Return the prefix of the draft in a version or an archive."""
    if f"{CHECKPOINT}/{CONFIG}" in manifest.files:
        return f"{CHECKPOINT}/"
    steps = [match for match in map(_STEP.match, manifest.files) if match is not None]
    if not steps:
        raise UnknownDraft(f"{place.url}: expected a checkpoint among its {len(manifest.files)} files, found none")
    return max(steps, key=lambda match: int(match[2]))[1] + "/"


def _of_hub(name: str, revision: str | None) -> FoundDraft:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=list(_DRAFT_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UnknownDraft(f"{name}: cannot be fetched from the Hugging Face hub: {error}") from error
    return FoundDraft(path, f"{name}@{path.name}")


def _is_of_a_draft(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _DRAFT_FILES)
