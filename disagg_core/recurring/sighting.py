"""What the watch has seen that calls for another draft, and what of it was told already: each change is told once.

A mark in the registry, ``watch/<condition>.json``, says that a condition was told. It is there for as long as the
condition lasts; when that is over it is removed, and the condition is told again when it comes back.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from disagg_core.storage.place import Place


class Told(BaseModel):
    """What was told of a condition: of which champion and what, and how many prompts the source had, where that counts.

    Another champion, or another difference, is another change.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    about: str
    prompts: int = 0


@dataclass(frozen=True)
class Sighting:
    """An event that is to be emitted, of which target, what was seen, and the mark that says so."""

    event: str
    target: str
    reason: str
    condition: str
    told: Told


class Marks:
    """The marks of what was told, in the place of one target's registry."""

    def __init__(self, registry: Place) -> None:
        self._place = registry.at("watch")

    def is_news(self, seen: Sighting, *, worth_telling: int) -> bool:
        """Whether `seen` is another change than the one that was told; of prompts, that so many more have come.

        Raises:
            StorageFailed, StorageUnusable: the registry does not answer.
        """
        name = f"{seen.condition}.json"
        if self._place.size(name) is None:
            return True
        told = Told.model_validate_json(self._place.read(name))
        if told.about != seen.told.about or seen.told.prompts < told.prompts:
            return True
        return seen.told.prompts - told.prompts >= worth_telling

    def keep(self, told: Sighting) -> None:
        """Remember that a sighting was told."""
        self._place.write(f"{told.condition}.json", [told.told.model_dump_json(indent=2).encode()])

    def clear(self, condition: str) -> None:
        """Forget a condition that is over."""
        self._place.remove(f"{condition}.json")
