"""The watch tells of each change once: not at every look, and again when what was over comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from disagg_core.recurring import watch as module
from disagg_core.recurring.night import Situation, assess
from disagg_core.recurring.watch import remember, watch
from disagg_core.registry.references import open_registry
from disagg_core.registry.registry import Registry
from disagg_core.run_spec.document import RunSpec
from disagg_core.settings import Settings
from tests.unit.recurring.test_night import TODAY, append, publish, spec_of

pytestmark = pytest.mark.unit

PROMOTED_WITH = 3.0
ARRIVED, CHANGED, DROPPED = "data.arrived", "target.changed", "accept_length.dropped"
Look = Callable[..., list[str]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The prompts of the night that made the champion."""
    path = tmp_path / "prompts.jsonl"
    append(path, 0, 50)
    return path


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def spec(source: Path) -> RunSpec:
    return spec_of(source)


@pytest.fixture
def registry(spec: RunSpec, settings: Settings, tmp_path: Path) -> Registry:
    """A champion that was trained on all the prompts there are."""
    opened = open_registry(spec, settings)
    another_night(opened, spec, tmp_path, "night-1")
    return opened


def another_night(registry: Registry, spec: RunSpec, tmp_path: Path, run: str, *, promoted: bool = True) -> None:
    mark = assess(spec, registry, TODAY, cache=tmp_path / "cache").mark
    publish(registry, run, mark, tmp_path, promoted=promoted, accept_length=PROMOTED_WITH)


@pytest.fixture
def look(spec: RunSpec, settings: Settings, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Look:
    """Look as `draft_watch` does; return what is told. Servers have the accept length that their name says."""
    monkeypatch.setattr(module, "served_accept_length", lambda url: float(url) if url != "silent" else None)
    monkeypatch.setattr(module, "situation_of", lambda _: TODAY)

    def look(server: str | None = None, situation: Situation = TODAY) -> list[str]:
        monkeypatch.setattr(module, "situation_of", lambda _: situation)
        told = watch(spec, settings, server, 0.1)
        remember(spec, settings, told)
        return [sighting.event.removeprefix("draftline.") for sighting in told]

    return look


def test_prompts_that_arrived_are_told_once_and_again_when_as_many_more_came(look: Look, source: Path) -> None:
    assert look() == []
    append(source, 50, 60)
    assert look() == [ARRIVED]
    assert look() == []
    append(source, 60, 69)
    assert look() == [], "recurring.min_new_prompts is 10"
    append(source, 69, 70)
    assert look() == [ARRIVED]
    assert look() == []


@pytest.mark.parametrize("promoted", [True, False])
def test_the_next_prompts_are_told_when_a_night_has_taken_the_last_ones(
    look: Look, source: Path, registry: Registry, spec: RunSpec, tmp_path: Path, promoted: bool
) -> None:
    append(source, 50, 60)
    assert look() == [ARRIVED]
    another_night(registry, spec, tmp_path, "night-2", promoted=promoted)
    assert look() == []
    append(source, 60, 69)
    assert look() == []
    append(source, 69, 70)
    assert look() == [ARRIVED]


def test_a_source_that_was_rewritten_is_another_change(look: Look, source: Path) -> None:
    append(source, 50, 80)
    assert look() == [ARRIVED]
    source.unlink()
    append(source, 100, 130)
    assert look() == [ARRIVED]
    assert look() == []


def test_a_target_that_changed_is_told_once_for_each_change(look: Look) -> None:
    second, third = (replace(TODAY, target_version=f"target-{number}") for number in (2, 3))
    assert look(situation=second) == [CHANGED]
    assert look(situation=second) == []
    assert look(situation=third) == [CHANGED]
    assert look() == [], "it is what the champion was made for again"
    assert look(situation=third) == [CHANGED]


def test_an_accept_length_that_dropped_is_told_once_until_it_has_recovered(look: Look) -> None:
    assert look("2.8") == []
    assert look("2.5") == [DROPPED]
    assert look("2.5") == []
    assert look("silent") == [], "a server that was started again has not recovered"
    assert look("2.5") == []


def test_every_server_has_a_mark_of_its_own(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    accepts = {"one": 2.5, "other": 2.5}
    monkeypatch.setattr(module, "served_accept_length", accepts.__getitem__)
    assert look("one") == [DROPPED]
    assert look("other") == [DROPPED]
    accepts["one"] = 3.0
    assert look("one") == []
    accepts["one"] = 2.5
    assert look("one") == [DROPPED]
    assert look("other") == []


def test_another_champion_makes_another_drop(look: Look, registry: Registry, spec: RunSpec, tmp_path: Path) -> None:
    assert look("2.5") == [DROPPED]
    another_night(registry, spec, tmp_path, "night-2")
    assert look("2.5") == [DROPPED]
    assert look("2.5") == []


def test_what_could_not_be_told_is_told_at_the_next_look(
    look: Look, spec: RunSpec, settings: Settings, source: Path
) -> None:
    append(source, 50, 60)
    (seen,) = watch(spec, settings, None, 0.1)
    assert seen.reason == "10 prompts since v1"
    assert look() == [ARRIVED]
