"""What a night of recurring training does, decided from the registry and a source that grows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from disagg_core.recurring.night import Night, Situation, plan_night
from disagg_core.registry.registry import Registry
from disagg_core.registry.versions import DataMark, Provenance
from disagg_core.run_spec.document import RunSpec
from disagg_core.storage.place import LocalPlace

pytestmark = pytest.mark.unit

TODAY = Situation("eagle3", "target-1", "tokenizer-1", (0, 1, 2))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(LocalPlace(tmp_path / "registry"), "model")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    append(path, 0, 50)
    return path


def append(path: Path, first: int, last: int) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps({"prompt": f"q{n}", "response": f"a{n}"}) + "\n" for n in range(first, last))


def spec_of(source: Path | str, **draft: object) -> RunSpec:
    return RunSpec.model_validate(
        {
            "target": {"model": "./target"},
            "draft": {"method": "eagle3", **draft},
            "data": {"prompts": str(source), "holdout": "./holdout.jsonl"},
            "recurring": {"min_new_prompts": 10, "replay": 0.5},
        }
    )


def tonight(registry: Registry, spec: RunSpec, tmp_path: Path, situation: Situation = TODAY) -> tuple[Night, list[str]]:
    """The night, and what it asks."""
    file = tmp_path / "tonight.jsonl"
    file.unlink(missing_ok=True)
    night = plan_night(spec, registry, situation, prompts=file, cache=tmp_path / "cache")
    lines = file.read_text().splitlines() if file.is_file() else []
    return night, [json.loads(line)["prompt"] for line in lines]


def publish(
    registry: Registry, run: str, mark: DataMark, tmp_path: Path, *, promoted: bool, accept_length: float | None = None
) -> None:
    draft = tmp_path / run
    draft.mkdir()
    (draft / "config.json").write_text(run)
    provenance = Provenance(
        run_id=run,
        method="eagle3",
        target="model",
        target_version="target-1",
        tokenizer_version="tokenizer-1",
        vocab_map_version="v",
        draft_vocab_size=24,
        layers=(0, 1, 2),
        data=mark,
        accept_length=accept_length,
        created=0.0,
    )
    version = registry.publish({"checkpoint": draft}, provenance)
    if promoted:
        champion = registry.champion()
        registry.promote(version.number, instead_of=champion.number if champion else None, by="us")


def test_the_first_night_trains_a_fresh_draft_on_all_prompts(registry: Registry, source: Path, tmp_path: Path) -> None:
    night, asked = tonight(registry, spec_of(source, vocab_size=24, hidden_size=32), tmp_path)
    assert night.skipped is None
    assert night.describe() == "a fresh draft is trained on all 50 prompts: the registry has no champion yet"
    assert asked == [f"q{n}" for n in range(50)]
    assert night.spec.data.prompts == str(tmp_path / "tonight.jsonl")
    assert night.spec.draft == spec_of(source, vocab_size=24, hidden_size=32).draft


def test_the_next_one_goes_on_from_the_champion_with_what_is_new_and_some_of_the_old(
    registry: Registry, source: Path, tmp_path: Path
) -> None:
    first, _ = tonight(registry, spec_of(source), tmp_path)
    publish(registry, "night-1", first.mark, tmp_path, promoted=True)
    append(source, 50, 70)
    night, asked = tonight(registry, spec_of(source, vocab_size=24, hidden_size=32), tmp_path)
    assert night.describe() == "v1 goes on with 20 new prompts and 10 older ones"
    assert asked[-20:] == [f"q{n}" for n in range(50, 70)]
    assert len(asked) == 30
    assert len(set(asked[:10]) & {f"q{n}" for n in range(50)}) == 10
    draft = night.spec.all_drafts[0]
    assert draft.init_from == "v1"
    assert draft.model_dump()["vocab_size"] is None  # the champion's
    assert tonight(registry, spec_of(source, vocab_size=24, hidden_size=32), tmp_path) == (night, asked)


def test_a_night_with_too_little_that_is_new_is_skipped(registry: Registry, source: Path, tmp_path: Path) -> None:
    first, _ = tonight(registry, spec_of(source), tmp_path)
    publish(registry, "night-1", first.mark, tmp_path, promoted=True)
    append(source, 50, 59)
    night, asked = tonight(registry, spec_of(source), tmp_path)
    assert night.skipped == "nothing new: 9 prompts since v1 (the champion), recurring.min_new_prompts is 10"
    assert asked == []


def test_what_was_rejected_is_not_tried_again_but_trained_on_with_what_comes_next(
    registry: Registry, source: Path, tmp_path: Path
) -> None:
    first, _ = tonight(registry, spec_of(source), tmp_path)
    publish(registry, "night-1", first.mark, tmp_path, promoted=True)
    append(source, 50, 70)
    second, _ = tonight(registry, spec_of(source), tmp_path)
    publish(registry, "night-2", second.mark, tmp_path, promoted=False)
    third, _ = tonight(registry, spec_of(source), tmp_path)
    assert third.skipped == "nothing new: 0 prompts since v2 (not promoted), recurring.min_new_prompts is 10"
    append(source, 70, 80)
    fourth, _ = tonight(registry, spec_of(source), tmp_path)
    assert (fourth.skipped, fourth.new) == (None, 30)


@pytest.mark.parametrize(
    ("situation", "why"),
    [
        (Situation("eagle3", "target-2", "tokenizer-1", (0, 1, 2)), "target revision target-1 became target-2"),
        (Situation("eagle3", "target-1", "tokenizer-2", (0, 1, 2)), "tokenizer or chat template"),
        (Situation("eagle3", "target-1", "tokenizer-1", (0, 1, 3)), "captured layers"),
        (Situation("dflash", "target-1", "tokenizer-1", (0, 1, 2)), "draft method eagle3 became dflash"),
        (Situation("eagle3", "target-1", "tokenizer-1", (0, 1, 2), 32), "draft vocabulary 24 became 32"),
    ],
)
def test_a_champion_of_something_else_is_not_continued(
    registry: Registry, source: Path, tmp_path: Path, situation: Situation, why: str
) -> None:
    first, _ = tonight(registry, spec_of(source), tmp_path)
    publish(registry, "night-1", first.mark, tmp_path, promoted=True)
    night, asked = tonight(registry, spec_of(source), tmp_path, situation)
    assert night.fresh is not None
    assert why in night.fresh
    assert (night.skipped, len(asked), night.spec.all_drafts[0].init_from) == (None, 50, None)


def test_a_source_that_was_rewritten_is_all_new(registry: Registry, source: Path, tmp_path: Path) -> None:
    first, _ = tonight(registry, spec_of(source), tmp_path)
    publish(registry, "night-1", first.mark, tmp_path, promoted=True)
    source.unlink()
    append(source, 100, 160)
    night, asked = tonight(registry, spec_of(source), tmp_path)
    assert (night.new, night.replayed, night.fresh) == (60, 0, None)
    assert len(asked) == 60


def test_a_folder_of_files_by_date_grows_by_files(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "days"
    folder.mkdir()
    append(folder / "2026-11-01.jsonl", 0, 20)
    first, _ = tonight(registry, spec_of(folder), tmp_path)
    assert first.mark.newest == "2026-11-01.jsonl:20"
    publish(registry, "night-1", first.mark, tmp_path, promoted=True)
    (folder / "2026-11-02.jsonl.gz").write_bytes(
        gzip.compress(
            b"".join(json.dumps({"prompt": f"q{n}", "response": "a"}).encode() + b"\n" for n in range(20, 35))
        )
    )
    night, asked = tonight(registry, spec_of(folder), tmp_path)
    assert (night.new, night.replayed) == (15, 8)
    assert asked[-15:] == [f"q{n}" for n in range(20, 35)]


def test_a_prefix_in_a_store_is_copied_once(registry: Registry, tmp_path: Path) -> None:
    folder = tmp_path / "bucket"
    folder.mkdir()
    append(folder / "a.jsonl", 0, 20)
    night, asked = tonight(registry, spec_of(f"file://{folder}"), tmp_path)
    assert (night.new, len(asked)) == (20, 20)
    (folder / "a.jsonl").rename(folder / "b.jsonl")
    again, _ = tonight(registry, spec_of(f"file://{folder}"), tmp_path)
    assert again.mark.newest == "b.jsonl:20"


def test_a_line_that_is_no_json_stays_a_bad_record(registry: Registry, source: Path, tmp_path: Path) -> None:
    with source.open("a") as file:
        file.write("{broken\n")
    file_of_the_night = tmp_path / "tonight.jsonl"
    plan_night(spec_of(source), registry, TODAY, prompts=file_of_the_night, cache=tmp_path / "cache")
    last = json.loads(file_of_the_night.read_text().splitlines()[-1])
    assert isinstance(last, str)
    assert last.startswith("prompts.jsonl:51: ")


def test_recurring_training_needs_prompts_that_stay_held_out_and_one_draft(source: Path) -> None:
    document = spec_of(source).model_dump(mode="json")
    document["data"]["holdout"] = None
    with pytest.raises(ValueError, match=r"recurring: expected data\.holdout"):
        RunSpec.model_validate(document)
