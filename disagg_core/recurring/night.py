"""What one night of recurring training does: it continues the champion on what is new, starts anew, or is skipped.

The champion is continued on the prompts that came since the run that made it, mixed with a share of older ones against
forgetting. Where it cannot be continued (there is none, or target, tokenizer, method, layers or vocabulary are others
by now) a fresh draft is trained on all prompts. A night is skipped if too few prompts came since the newest version,
promoted or rejected: the same data would come to the same end.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from disagg_core.recurring.sources import Marks, line_of, records_of
from disagg_core.registry.registry import Registry
from disagg_core.registry.versions import DataMark, Provenance, Version
from disagg_core.run_spec.data import DataSection
from disagg_core.run_spec.document import RunSpec


class Night(BaseModel):
    """What a night was found to be; kept in the run's directory, so that every process of the run does the same.

    `spec` is what is run: its prompts are a file of `new` and `replayed` ones. `fresh` says why no draft is continued,
    `skipped` why nothing is trained; `mark` is how far the source had come.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    spec: RunSpec
    mark: DataMark
    champion: str | None = None
    new: int = 0
    replayed: int = 0
    fresh: str | None = None
    skipped: str | None = None

    def describe(self) -> str:
        """Return the night in words."""
        if self.skipped is not None:
            return self.skipped
        if self.fresh is not None:
            return f"a fresh draft is trained on all {self.new} prompts: {self.fresh}"
        return f"{self.champion} goes on with {self.new} new prompts and {self.replayed} older ones"


@dataclass(frozen=True)
class Situation:
    """What a draft is trained for tonight. One that was made for another target or tokenizer is not continued."""

    method: str
    target_version: str
    tokenizer_version: str
    layers: tuple[int, ...]
    draft_vocab_size: int | None = None
    """As the document says; None: as the champion has it."""

    def differences(self, made: Provenance) -> list[str]:
        """Return in what a version was made for something else."""
        pairs: dict[str, tuple[object, object]] = {
            "draft method": (made.method, self.method),
            "target revision": (made.target_version, self.target_version),
            "tokenizer or chat template": (made.tokenizer_version, self.tokenizer_version),
            "captured layers": (tuple(made.layers), tuple(self.layers)),
            "draft vocabulary": (made.draft_vocab_size, self.draft_vocab_size or made.draft_vocab_size),
        }
        return [f"{what} {was} became {now}" for what, (was, now) in pairs.items() if was != now]


def plan_night(spec: RunSpec, registry: Registry, situation: Situation, *, prompts: Path, cache: Path) -> Night:
    """Decide what tonight's run does, and write its prompts to the file `prompts`, one JSON record a line.

    Raises:
        PromptError: the source cannot be read.
        StorageFailed, StorageUnusable: registry or source do not answer.
    """
    night = assess(spec, registry, situation, cache=cache)
    if night.skipped is None:
        done = night.mark.prompts - night.new
        _write(spec.data, cache, night.mark.prompts, done, _replayed(spec, done, night.replayed), prompts)
    champion = night.champion if night.fresh is None else None
    return night.model_copy(update={"spec": _spec_of_night(spec, champion, prompts)})


def assess(spec: RunSpec, registry: Registry, situation: Situation, *, cache: Path) -> Night:
    """Decide what a run would do by now, without writing anything; its `spec` is the one given.

    Raises:
        PromptError: the source cannot be read.
        StorageFailed, StorageUnusable: registry or source do not answer.
    """
    assert spec.recurring is not None
    section, champion = spec.recurring, registry.champion()
    newest = next(reversed(registry.versions()), None)
    counts = {known.prompts for version in (champion, newest) if (known := _mark_of(version)) is not None}
    mark, earlier = _survey(spec.data, cache, counts)
    fresh = _why_fresh(champion, situation)
    skipped = None
    if newest is not None and not situation.differences(newest.provenance):
        arrived = mark.prompts - _done(newest, earlier)
        if arrived < section.min_new_prompts:
            role = "the champion" if champion is not None and champion.number == newest.number else "not promoted"
            skipped = (
                f"nothing new: {arrived} prompts since {newest.label} ({role}), "
                f"recurring.min_new_prompts is {section.min_new_prompts}"
            )
    done = _done(champion, earlier) if champion is not None and fresh is None else 0
    new = mark.prompts - done
    return Night(
        spec=spec,
        mark=mark,
        champion=champion.label if champion is not None else None,
        new=new,
        replayed=min(done, round(section.replay * new)),
        fresh=fresh,
        skipped=skipped,
    )


def _replayed(spec: RunSpec, done: int, count: int) -> set[int]:
    """Return which of the `done` older prompts are trained on again: `count` of them, drawn by the run's seed."""
    return set(random.Random(spec.run.seed).sample(range(done), count))


def _why_fresh(champion: Version | None, situation: Situation) -> str | None:
    if champion is None:
        return "the registry has no champion yet"
    differences = situation.differences(champion.provenance)
    return f"{champion.label} cannot be continued: {'; '.join(differences)}" if differences else None


def _mark_of(version: Version | None) -> DataMark | None:
    return version.provenance.data if version is not None else None


def _survey(data: DataSection, cache: Path, counts: Collection[int]) -> tuple[DataMark, dict[int, str | None]]:
    """Return the source's mark, and the hash over its first n records for each n of `counts` that it has."""
    marks, earlier = Marks(data.prompts), {}
    for count, (where, record) in enumerate(records_of(data, cache), start=1):
        marks.take(where, line_of(record))
        if count in counts:
            earlier[count] = marks.mark().sha256
    return marks.mark(), earlier


def _done(version: Version, earlier: dict[int, str | None]) -> int:
    """Return how many of the source's records the run of `version` knew: none if they are not what they were then."""
    mark = version.provenance.data
    return mark.prompts if mark is not None and earlier.get(mark.prompts) == mark.sha256 else 0


def _write(data: DataSection, cache: Path, total: int, done: int, replayed: Collection[int], to: Path) -> None:
    """Write the records from `done` on, and those in `replayed`, to the file `to`, whole or not at all."""
    part = to.with_name(f"{to.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("wb") as file:
        for index, (_, record) in enumerate(islice(records_of(data, cache), total)):
            if index >= done or index in replayed:
                file.write(line_of(record))
    part.replace(to)


def _spec_of_night(spec: RunSpec, champion: str | None, prompts: Path) -> RunSpec:
    draft = spec.all_drafts[0]
    if champion is not None:
        draft = draft.continuing(champion)
    data = spec.data.model_copy(update={"prompts": str(prompts)})
    return RunSpec.model_validate(
        {**spec.model_dump(mode="json"), "draft": draft.model_dump(mode="json"), "data": data.model_dump(mode="json")}
    )
