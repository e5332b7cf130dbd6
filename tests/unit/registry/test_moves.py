"""Moves of the champion on storages that lose an answer, or do not keep their word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from disagg_core.registry.registry import Registry
from disagg_core.registry.versions import ChampionMoved, Event, Provenance, champions_of
from disagg_core.storage.place import LocalPlace, StorageUnusable, check_exclusive, open_place

pytestmark = pytest.mark.unit

Create = Callable[[LocalPlace, str, bytes], bool]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """A registry of two versions."""
    (tmp_path / "weights").write_bytes(b"weights")
    opened = Registry(open_place(str(tmp_path / "registry")), "target")
    for night in (1, 2):
        provenance = Provenance(
            run_id=f"night-{night}",
            method="eagle3",
            target="t",
            target_version="t",
            tokenizer_version="k",
            vocab_map_version="m",
            draft_vocab_size=4,
            layers=(1,),
            created=1.0,
        )
        opened.publish({"checkpoint/draft.safetensors": tmp_path / "weights"}, provenance)
    return opened


@pytest.fixture
def create(monkeypatch: pytest.MonkeyPatch) -> Callable[[Create], None]:
    """Put another way to create an event in place of the storage's."""
    real = LocalPlace.create

    def put(other: Create) -> None:
        def created(self: LocalPlace, name: str, data: bytes) -> bool:
            return other(self, name, data) if name.endswith(".json") else real(self, name, data)

        monkeypatch.setattr(LocalPlace, "create", created)

    return put


def test_a_move_whose_answer_was_lost_is_known_again(registry: Registry, create: Callable[[Create], None]) -> None:
    def written_twice(place: LocalPlace, name: str, data: bytes) -> bool:
        place.write(name, [data])
        return False

    create(written_twice)
    event = registry.promote(1, instead_of=None, by="us")
    assert registry.history() == [event]


def test_who_was_faster_between_the_look_and_the_move_is_named(
    registry: Registry, create: Callable[[Create], None]
) -> None:
    def after_another(place: LocalPlace, name: str, data: bytes) -> bool:
        theirs = Event.model_validate_json(data).model_copy(update={"by": "them", "version": 2, "token": "theirs"})
        place.write(name, [theirs.model_dump_json().encode()])
        return False

    create(after_another)
    with pytest.raises(ChampionMoved, match="v1 was to take the place of none, but them promoted v2") as caught:
        registry.promote(1, instead_of=None, by="us")
    assert caught.value.winner is not None
    assert caught.value.winner.by == "them"


def test_a_storage_that_writes_over_what_is_there_is_refused(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written_over(self: LocalPlace, name: str, data: bytes) -> bool:
        self.write(name, [data])
        return True

    check_exclusive(registry.place)
    monkeypatch.setattr(LocalPlace, "create", written_over)
    with pytest.raises(StorageUnusable, match="expected a storage with conditional writes"):
        registry.promote(1, instead_of=None, by="us")
    assert registry.history() == []
    assert sorted(path.name for path in Path(registry.place.url).iterdir()) == ["claims", "versions"]


@pytest.mark.parametrize(
    ("moves", "stack"),
    [
        ([], []),
        (["+1", "+2", "+3"], [1, 2, 3]),
        (["+1", "+2", "+3", "-2"], [1, 2]),
        (["+1", "+2", "+3", "-2", "-1"], [1]),
        (["+1", "+2", "-1", "+3"], [1, 3]),
        (["+1", "+2", "-1", "-2"], [1, 2]),
    ],
)
def test_rollbacks_go_back_through_the_promotions(moves: list[str], stack: list[int]) -> None:
    events = [
        Event(
            number=number,
            kind="promoted" if move[0] == "+" else "rolled_back",
            version=int(move[1:]),
            previous=None,
            at=0.0,
            by="us",
        )
        for number, move in enumerate(moves, start=1)
    ]
    assert champions_of(events) == stack
