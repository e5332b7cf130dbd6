"""The registry in a directory and on an S3 server: versions are whole or not there, and the champion moves once."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from disagg_core.errors import BadInput
from disagg_core.registry.registry import Registry, targets_of, the_target_of
from disagg_core.registry.versions import ChampionMoved, Event, NothingToRollBack, UnknownVersion, VersionExists
from disagg_core.storage.place import open_place
from disagg_core.storage.trees import TreeDamaged
from tests.integration.registry.conftest import ROOT
from tests.integration.registry.kit import TARGET, make_draft, provenance, registry_at, upload

pytestmark = pytest.mark.integration


@pytest.fixture
def registry(url: str) -> Registry:
    return registry_at(url)


def publish(registry: Registry, where: Path, run_id: str, seed: int = 0) -> int:
    return registry.publish(make_draft(where / run_id, seed), provenance(run_id)).number


def test_a_version_is_kept_as_it_was_published(registry: Registry, tmp_path: Path) -> None:
    assert registry.versions() == []
    made = registry.publish(make_draft(tmp_path / "draft"), provenance("night-1", accept_length=2.5))
    assert made.label == "v1"
    assert registry.versions() == [made]
    assert registry.version(1).provenance == provenance("night-1", accept_length=2.5)
    assert registry.verify(1) == made
    assert registry.of_run("night") == made
    assert registry.of_run("day") is None

    fetched = registry.fetch(1, "checkpoint", tmp_path / "fetched")
    weights = (tmp_path / "draft" / "checkpoint" / "draft.safetensors").read_bytes()
    assert (fetched / "draft.safetensors").read_bytes() == weights
    assert sorted(path.name for path in fetched.iterdir()) == ["config.json", "draft.safetensors"]
    with pytest.raises(UnknownVersion, match="expected a part export/hf"):
        registry.fetch(1, "export/hf", tmp_path / "other")
    with pytest.raises(UnknownVersion, match=r"no version v2; there are: v1"):
        registry.fetch(2, "checkpoint", tmp_path / "other")


def test_a_run_publishes_each_of_its_drafts_once(registry: Registry, tmp_path: Path) -> None:
    first = registry.publish(make_draft(tmp_path / "a"), provenance("night-1"))
    assert registry.publish(make_draft(tmp_path / "a"), provenance("night-1")) == first
    beside = registry.publish(make_draft(tmp_path / "b", seed=7), provenance("night-1", draft="wide"))
    assert beside.number == 2
    with pytest.raises(VersionExists, match=r"v1 is this run's already, with other content of checkpoint/draft"):
        registry.publish(make_draft(tmp_path / "c", seed=9), provenance("night-1"))
    assert [version.number for version in registry.versions()] == [1, 2]


def test_the_champion_moves_and_goes_back_through_its_history(registry: Registry, tmp_path: Path) -> None:
    for night in range(1, 4):
        publish(registry, tmp_path, f"night-{night}", seed=night)
    assert registry.champion() is None
    with pytest.raises(NothingToRollBack, match="found none"):
        registry.rollback(by="us")
    registry.promote(1, instead_of=None, by="night-1")
    with pytest.raises(NothingToRollBack, match="v1, the only one so far"):
        registry.rollback(by="us")
    registry.promote(2, instead_of=1, by="night-2")
    registry.promote(3, instead_of=2, by="night-3", reason="+4 %")
    assert registry.rollback(by="us", reason="complaints").version == 2
    assert registry.rollback(by="us").version == 1
    champion = registry.champion()
    assert champion is not None
    assert champion.label == "v1"
    assert registry.rollback(by="us", to=3).version == 3
    assert [event.describe() for event in registry.history()] == [
        "night-1 promoted v1",
        "night-2 promoted v2 in place of v1",
        "night-3 promoted v3 in place of v2",
        "us rolled back to v2 in place of v3",
        "us rolled back to v1 in place of v2",
        "us rolled back to v3 in place of v1",
    ]
    with pytest.raises(UnknownVersion):
        registry.promote(9, instead_of=3, by="us")


def test_of_promotions_at_the_same_time_one_wins_and_the_others_say_which(
    registry: Registry, url: str, tmp_path: Path
) -> None:
    writers = 6
    for night in range(1, writers + 1):
        publish(registry, tmp_path, f"night-{night}", seed=night)
    ready = threading.Barrier(writers)
    won: list[Event] = []
    lost: list[ChampionMoved] = []

    def promote(number: int) -> None:
        mine = registry_at(url)
        ready.wait()
        try:
            won.append(mine.promote(number, instead_of=None, by=f"night-{number}"))
        except ChampionMoved as error:
            lost.append(error)

    threads = [threading.Thread(target=promote, args=(number,)) for number in range(1, writers + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert registry.history() == won
    assert len(lost) == writers - 1
    assert all(error.winner == won[0] and won[0].by in str(error) for error in lost)


def test_versions_that_are_published_at_the_same_time_get_numbers_of_their_own(
    registry: Registry, url: str, tmp_path: Path
) -> None:
    threads = [
        threading.Thread(target=publish, args=(registry_at(url), tmp_path, f"night-{number}", number))
        for number in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    versions = registry.versions()
    assert [version.number for version in versions] == [1, 2, 3, 4]
    assert {version.provenance.run_id for version in versions} == {f"night-{number}" for number in range(4)}
    assert all(registry.verify(version.number) == version for version in versions)


def test_a_damaged_version_is_refused_by_name(registry: Registry, url: str, tmp_path: Path) -> None:
    publish(registry, tmp_path, "night-1")
    place = open_place(url).at(f"{TARGET}/versions/000001")
    place.write("checkpoint/draft.safetensors", [b"other"])
    with pytest.raises(TreeDamaged, match=r"checkpoint/draft\.safetensors: expected 1000 bytes, found 5"):
        registry.verify(1)
    with pytest.raises(TreeDamaged, match=r"draft\.safetensors"):
        registry.fetch(1, "checkpoint", tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".fetched")] == []


@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_an_upload_killed_at_any_point_leaves_nothing_that_looks_whole_and_is_finished_by_the_next(
    registry: Registry, url: str, tmp_path: Path, kills: int
) -> None:
    def killed(run_id: str, die_at: int) -> int:
        arguments = [url, str(tmp_path / "draft"), run_id, str(die_at)]
        command = [sys.executable, "-m", "tests.integration.registry.kit", *arguments]
        return subprocess.run(command, cwd=ROOT, timeout=120, check=False).returncode

    steps = upload(url, tmp_path / "draft", "night-0")
    points = sorted({1 + round(index * (steps - 2) / (kills - 1)) for index in range(kills)})
    assert len(points) == kills
    for index, die_at in enumerate(points, start=1):
        run_id = f"night-{index}"
        assert killed(run_id, die_at) == -signal.SIGKILL
        finished = registry.of_run(run_id)
        if finished is not None:  # only the manifest's own read-back was left to do
            assert die_at >= steps - 2
            assert registry.verify(finished.number) == finished
        upload(url, tmp_path / "draft", run_id)
        made = registry.of_run(run_id)
        assert made is not None
        assert registry.verify(made.number) == made
        assert made.number == index + 1
    assert registry.unfinished() == {}
    assert len(registry.versions()) == kills + 1


def test_what_an_unfinished_upload_of_another_draft_left_is_replaced(
    registry: Registry, url: str, tmp_path: Path
) -> None:
    open_place(url).at(TARGET).create("claims/000001.json", b'{"run_id": "night-1", "draft": "draft"}')
    place = open_place(url).at(f"{TARGET}/versions/000001")
    place.write("checkpoint/draft.safetensors", [b"half"])
    place.write("export/hf/model.safetensors", [b"of an earlier try"])
    assert registry.unfinished() == {1: "night-1"}
    assert registry.versions() == []
    made = registry.publish(make_draft(tmp_path / "draft"), provenance("night-1"))
    assert made.number == 1
    assert "export/hf/model.safetensors" not in place.names()
    assert registry.verify(1) == made


def test_one_place_keeps_the_drafts_of_several_targets(url: str, tmp_path: Path) -> None:
    place = open_place(url)
    with pytest.raises(BadInput, match="there are none"):
        the_target_of(place, None)
    publish(registry_at(url), tmp_path, "night-1")
    assert the_target_of(place, None) == TARGET
    Registry(place, "other").publish(make_draft(tmp_path / "other"), provenance("day-1"))
    assert targets_of(place) == ["other", TARGET]
    with pytest.raises(BadInput, match="expected the name of one of its targets"):
        the_target_of(place, None)
    assert the_target_of(place, "other") == "other"
