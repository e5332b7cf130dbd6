"""Old archives go, but never one that a registry refers to."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from disagg_core.registry.registry import Registry
from disagg_core.registry.retained import prune, retained_runs
from disagg_core.registry.versions import Provenance
from disagg_core.report.archive import ArchiveFacts, archive_files
from disagg_core.report.retention import KnownArchive, expired, known_archives
from disagg_core.storage.place import LocalPlace, open_place
from flows.cli import app as cli

pytestmark = pytest.mark.unit

DAY = 86_400.0
NOW = 1000 * DAY


def an_archive(run_id: str, age: float, name: str = "nightly") -> KnownArchive:
    facts = ArchiveFacts(run_id=run_id, name=name, created=NOW - age * DAY, complete=True)
    return KnownArchive(LocalPlace(Path("/nowhere") / run_id), facts, 1)


@pytest.mark.parametrize(
    ("last", "days", "referenced", "gone"),
    [
        (1, 0, (), ["b", "c", "d"]),
        (2, 0, (), ["c", "d"]),
        (1, 15, (), ["c", "d"]),
        (1, 0, ("c",), ["b", "d"]),
        (9, 0, (), []),
        (1, 99, (), []),
    ],
)
def test_archives_go_by_count_and_age(last: int, days: float, referenced: tuple[str, ...], gone: list[str]) -> None:
    archives = [an_archive("c", 20), an_archive("a", 1), an_archive("d", 30), an_archive("b", 10)]
    archives.append(an_archive("other", 500, name="of another name"))
    found = expired(archives, last=last, days=days, now=NOW, referenced=referenced)
    assert [archive.facts.run_id for archive in found] == gone


@pytest.fixture
def nights(tmp_path: Path) -> str:
    """Archives of five old nights; the draft of the second is in the registry, the fourth is not finished."""
    (tmp_path / "weights").write_bytes(b"weights")
    base, registry = tmp_path / "archive", tmp_path / "registry"
    for night in range(1, 6):
        facts = ArchiveFacts(
            run_id=f"night-{night}", name="night", created=night * DAY, complete=True, registry=str(registry)
        )
        archive_files({"weights": tmp_path / "weights"}, str(base / f"night-{night}"), facts)
    (base / "night-4" / "manifest.json").unlink()
    provenance = Provenance(
        run_id="night-2",
        method="eagle3",
        target="t",
        target_version="t",
        tokenizer_version="k",
        vocab_map_version="m",
        draft_vocab_size=4,
        layers=(1,),
        created=1.0,
    )
    Registry(open_place(str(registry)), "t").publish({"checkpoint/draft.safetensors": tmp_path / "weights"}, provenance)
    return str(base)


def test_what_a_registry_refers_to_stays(nights: str, tmp_path: Path) -> None:
    assert retained_runs([str(tmp_path / "registry"), None]) == {"night-2"}
    planned = [archive.facts.run_id for archive in prune(nights, last=1, days=1, remove=False)]
    assert planned == ["night-3", "night-1"]
    assert [archive.facts.run_id for archive in prune(nights, last=1, days=1)] == planned
    assert [archive.facts.run_id for archive in known_archives(open_place(nights))] == ["night-2", "night-5"]
    assert sorted(path.name for path in Path(nights).iterdir()) == ["night-2", "night-4", "night-5"]


def test_it_is_done_from_the_command_line(
    nights: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["draftline", "archive", "prune", "--url", nights, *options])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        return capsys.readouterr().out

    assert f"would go: {nights}/night-1" in said("--last", "1", "--days", "1", "--dry-run")
    assert f"removed: {nights}/night-3" in said("--last", "1", "--days", "1")
    assert said("--last", "1", "--days", "1") == "nothing is old enough to go\n"
