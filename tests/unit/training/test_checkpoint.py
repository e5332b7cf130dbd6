"""A checkpoint is whole or it is not there."""

import dataclasses
import errno
import json
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import torch

from disagg_core.errors import CheckpointError, CheckpointNotSaved
from disagg_core.training.checkpoint import (
    BestMeasured,
    CheckpointContent,
    CheckpointSaver,
    DataCursor,
    DraftContent,
    DraftProgress,
    TrainerState,
    covered_ordinals,
    directory,
    kept_checkpoints,
    load_checkpoint,
    newest_complete,
    prune_checkpoints,
    read_state,
    save_checkpoint,
    saving,
    verify_checkpoint,
)
from tests.unit.core.test_files import largest_file

pytestmark = pytest.mark.unit

IDENTITY = {"run_id": "r", "target": "t", "vocab_map": "v"}


def content(step: int, folders: Sequence[str] = ("",)) -> CheckpointContent:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(6, 4, generator=generator)
    draft = DraftContent(
        weights={"fc.weight": weight, "t2d": torch.tensor([True, False]), "d2t": torch.arange(3)},
        config={"architectures": ["LlamaForCausalLMEagle3"], "hidden_size": 4},
        optimizer={"fc.weight.exp_avg": weight * 2, "fc.weight.step": torch.tensor(float(step))},
        rng={"cpu": torch.get_rng_state()},
    )
    return CheckpointContent(
        drafts=dict.fromkeys(folders, draft),
        state=TrainerState(
            step=step,
            samples=8 * step,
            tokens=100 * step,
            seed=3,
            total_steps=10,
            identity=IDENTITY,
            cursor=DataCursor(trained=[(0, 8 * step)], quarantined=[(99, 99)]),
            drafts=dict.fromkeys(folders, DraftProgress(step=step, loss_first=5.0)),
        ),
    )


def other_config(saved: CheckpointContent) -> CheckpointContent:
    draft = dataclasses.replace(saved.drafts[""], config={"hidden_size": 5})
    return dataclasses.replace(saved, drafts={"": draft})


def same(left: CheckpointContent, right: CheckpointContent) -> bool:
    return (
        left.state == right.state
        and left.drafts.keys() == right.drafts.keys()
        and all(same_draft(left.drafts[folder], right.drafts[folder]) for folder in left.drafts)
    )


def same_draft(left: DraftContent, right: DraftContent) -> bool:
    for field in ("weights", "optimizer", "rng"):
        mine, theirs = getattr(left, field), getattr(right, field)
        if mine.keys() != theirs.keys() or not all(torch.equal(mine[name], theirs[name]) for name in mine):
            return False
    return left.config == right.config


def test_what_was_saved_comes_back_bit_for_bit(tmp_path):
    path = save_checkpoint(tmp_path, content(4), keep=2)

    assert path == tmp_path / "step-4"
    assert same(load_checkpoint(path, identity=IDENTITY), content(4))
    assert read_state(path).cursor.trained == [(0, 32)]
    assert verify_checkpoint(path) == 4
    assert not list(tmp_path.glob(".*"))


def test_several_drafts_are_one_checkpoint_with_a_folder_for_each(tmp_path):
    saved = content(4, ["eagle3", "flash"])
    path = save_checkpoint(tmp_path, saved, keep=2)

    assert same(load_checkpoint(path), saved)
    assert verify_checkpoint(path) == 4
    assert sorted(entry.name for entry in path.iterdir()) == ["eagle3", "flash", "manifest.json", "trainer.json"]
    damaged = path / "flash" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"flash/optimizer\.safetensors"):
        verify_checkpoint(path)


def test_the_checkpoint_of_an_untrained_draft_comes_back_though_its_optimizer_has_no_state(tmp_path):
    saved = content(0)
    draft = dataclasses.replace(saved.drafts[""], optimizer={})
    untrained = dataclasses.replace(saved, drafts={"": draft})

    path = save_checkpoint(tmp_path, untrained, keep=2)

    assert same(load_checkpoint(path), untrained)


def test_its_files_are_as_readable_as_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    folder = save_checkpoint(tmp_path / "checkpoints", content(3), keep=2)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 5
    assert {path.stat().st_mode for path in files} == {(tmp_path / "plain").stat().st_mode}


def test_the_manifest_lists_every_file_with_size_and_hash(tmp_path):
    path = save_checkpoint(tmp_path, content(1), keep=2)

    manifest = json.loads((path / "manifest.json").read_text())

    assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {"manifest.json"}
    assert all(entry["size"] == (path / name).stat().st_size for name, entry in manifest["files"].items())


def test_the_newest_whole_checkpoint_is_found_past_torn_ones(tmp_path):
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, content(step), keep=9)
    (tmp_path / "step-4" / "manifest.json").unlink()
    damaged = tmp_path / "step-3" / "optimizer.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)

    assert newest_complete(tmp_path) == tmp_path / "step-2"


@pytest.mark.parametrize("name", ["draft.safetensors", "optimizer.safetensors", "trainer.json", "rng.safetensors"])
def test_every_truncated_file_is_named(tmp_path, name):
    path = save_checkpoint(tmp_path, content(1), keep=2)
    (path / name).write_bytes((path / name).read_bytes()[:-1])

    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(path)


def test_a_missing_file_and_a_damaged_manifest_are_named(tmp_path):
    path = save_checkpoint(tmp_path, content(1), keep=2)
    (path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: listed in"):
        verify_checkpoint(path)
    (path / "manifest.json").write_text('{"format": 1')
    with pytest.raises(CheckpointError, match=r"manifest\.json: cannot be read"):
        verify_checkpoint(path)
    (path / "manifest.json").write_bytes(msgspec.json.encode({"format": 7, "step": 1, "files": {}}))
    with pytest.raises(CheckpointError, match="expected checkpoint format 3, found 7"):
        verify_checkpoint(path)


class Mount:
    """Stands before the reads of checkpoints and refuses those below the given directories for the first few times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        self._code = code
        self._away: dict[Path, int] = {}
        self._verify = verify_checkpoint
        monkeypatch.setattr(directory, "verify_checkpoint", self)
        monkeypatch.setattr(directory, "_READ_PAUSES_S", (0.001, 0.001))

    def refuse(self, path: Path, times: int) -> None:
        self._away[path] = times

    def __call__(self, path: Path) -> int:
        if self._away.get(path, 0) > 0:
            self._away[path] -= 1
            raise OSError(self._code, "the mount does not answer", str(path))
        return self._verify(path)


@pytest.fixture(params=[errno.EIO, errno.ESTALE], ids=["EIO", "ESTALE"])
def mount(request, monkeypatch):
    return Mount(monkeypatch, request.param)


def test_a_newest_checkpoint_that_cannot_be_read_falls_back_to_the_older_one(tmp_path, mount, caplog):
    paths = [save_checkpoint(tmp_path, content(step), keep=9) for step in (1, 2, 3)]
    mount.refuse(paths[2], times=99)
    assert newest_complete(tmp_path) == paths[1]
    assert "cannot be read" in caplog.text
    assert covered_ordinals(tmp_path).ranges() == [(0, 16), (99, 99)]


def test_a_checkpoint_that_can_be_read_again_is_the_newest(tmp_path, mount):
    paths = [save_checkpoint(tmp_path, content(step), keep=9) for step in (1, 2)]
    mount.refuse(paths[1], times=2)
    assert newest_complete(tmp_path) == paths[1]


def test_with_no_checkpoint_that_can_be_read_the_run_does_not_begin_anew(tmp_path, mount):
    for step in (1, 2):
        mount.refuse(save_checkpoint(tmp_path, content(step), keep=9), times=99)
    with pytest.raises(CheckpointError, match="found none that can be read"):
        newest_complete(tmp_path)


def test_an_unreadable_file_inside_a_checkpoint_counts_as_one(tmp_path, monkeypatch):
    """The error comes from the file system itself here: a directory stands where the weights were."""
    monkeypatch.setattr(directory, "_READ_PAUSES_S", ())
    paths = [save_checkpoint(tmp_path, content(step), keep=9) for step in (1, 2)]
    (paths[1] / "manifest.json").unlink()
    (paths[1] / "manifest.json").symlink_to("/proc/self/mem")
    assert newest_complete(tmp_path) == paths[0]


@pytest.mark.parametrize("limit", [100, 400], ids=["for the first file", "for a later one"])
def test_a_disk_without_room_leaves_no_half_checkpoint_and_the_older_one(tmp_path, limit):
    older = save_checkpoint(tmp_path, content(1), keep=2)
    with largest_file(limit), pytest.raises(CheckpointNotSaved, match=r"step-2: .* needs \d+ bytes, \d+ .* free"):
        save_checkpoint(tmp_path, content(2), keep=2)
    assert list(tmp_path.iterdir()) == [older]
    assert newest_complete(tmp_path) == older
    assert newest_complete(tmp_path) != save_checkpoint(tmp_path, content(2), keep=2)


def test_a_disk_that_refuses_what_it_had_taken_leaves_no_half_checkpoint_either(tmp_path, monkeypatch):
    older = save_checkpoint(tmp_path, content(1), keep=2)

    def refuse(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(saving, "_sync", refuse)
    with pytest.raises(CheckpointNotSaved, match="No space left"):
        save_checkpoint(tmp_path, content(2), keep=2)
    assert list(tmp_path.iterdir()) == [older]


def test_what_killed_writers_left_makes_room_before_the_next_is_written(tmp_path, monkeypatch):
    left = tmp_path / ".step-4.123.tmp"
    left.mkdir()
    seen = []
    writer = saving.SafetensorsWriter
    write = writer.write_data
    monkeypatch.setattr(writer, "write_data", lambda *planned: (seen.append(left.exists()), write(*planned))[1])
    save_checkpoint(tmp_path, content(5), keep=2)
    assert seen == [False]


def test_a_checkpoint_that_cannot_take_its_place_leaves_the_one_that_has_it(tmp_path, monkeypatch):
    older = save_checkpoint(tmp_path, content(2), keep=2)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if target == older and ".replaced" not in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointNotSaved, match="No space left"):
        save_checkpoint(tmp_path, other_config(content(2)), keep=2)
    assert same(load_checkpoint(older), content(2))
    assert list(tmp_path.iterdir()) == [older]


def test_nothing_saved_means_nothing_to_resume(tmp_path):
    assert newest_complete(tmp_path / "none") is None


def test_old_checkpoints_go_but_the_untrained_draft_stays(tmp_path):
    for step in (0, 5, 10, 15):
        save_checkpoint(tmp_path, content(step), keep=2)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0", "step-10", "step-15"]


def with_best(saved: CheckpointContent, step: int) -> CheckpointContent:
    best = BestMeasured(step=step, figure="loss", value=1.0)
    drafts = {name: msgspec.structs.replace(own, best=best) for name, own in saved.state.drafts.items()}
    return dataclasses.replace(saved, state=msgspec.structs.replace(saved.state, drafts=drafts))


def test_the_best_checkpoint_stays_beside_the_newest_and_is_archived_with_them(tmp_path):
    for step, best in ((0, 0), (5, 5), (10, 5), (15, 5), (20, 5)):
        save_checkpoint(tmp_path, with_best(content(step), best), keep=2)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0", "step-15", "step-20", "step-5"]
    assert [path.name for path in kept_checkpoints(tmp_path, 1)] == ["step-20", "step-5"]
    save_checkpoint(tmp_path, with_best(content(25), 25), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0", "step-20", "step-25"]
    (tmp_path / "step-25" / "trainer.json").write_text("torn")
    assert [path.name for path in kept_checkpoints(tmp_path, 1)] == ["step-25"]


def test_a_checkpoint_of_the_format_before_is_read(tmp_path):
    path = save_checkpoint(tmp_path, content(4), keep=2)
    state = json.loads((path / "trainer.json").read_text())
    for own in state["drafts"].values():
        del own["best"]
    (path / "trainer.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text()) | {"format": 2}
    manifest["files"]["trainer.json"] = msgspec.to_builtins(directory.entry_of(path / "trainer.json"))
    (path / "manifest.json").write_text(json.dumps(manifest))

    assert newest_complete(tmp_path) == path
    assert same(load_checkpoint(path), content(4))


@pytest.fixture
def saver(tmp_path):
    opened = CheckpointSaver(tmp_path, keep=2, group=None, device=torch.device("cpu"))
    yield opened
    opened.close()


def test_what_changes_while_a_checkpoint_is_written_is_not_in_it(tmp_path, saver):
    saved = content(4)
    saver.start(saved)
    saved.drafts[""].weights["fc.weight"].zero_()
    saved.drafts[""].optimizer["fc.weight.exp_avg"].zero_()

    assert saver.take() == tmp_path / "step-4"
    assert saver.done
    assert same(load_checkpoint(tmp_path / "step-4"), content(4))


def test_a_save_that_fails_in_the_background_says_so_when_its_end_is_taken_and_the_next_one_works(tmp_path, saver):
    older = save_checkpoint(tmp_path, content(1), keep=2)
    with largest_file(400):
        saver.start(content(2))
        with pytest.raises(CheckpointNotSaved, match=r"step-2: .* needs \d+ bytes, \d+ .* free"):
            saver.take()
    assert list(tmp_path.iterdir()) == [older]

    saver.start(content(3))
    saver.take()
    assert newest_complete(tmp_path) == tmp_path / "step-3"


def test_a_saver_that_is_closed_lets_its_save_come_to_its_end(tmp_path, caplog):
    opened = CheckpointSaver(tmp_path, keep=2, group=None, device=torch.device("cpu"))
    opened.start(content(4))
    opened.close()
    assert newest_complete(tmp_path) == tmp_path / "step-4"

    opened = CheckpointSaver(tmp_path, keep=2, group=None, device=torch.device("cpu"))
    with largest_file(400):
        opened.start(content(5))
        opened.close()
    assert "is not whole" in caplog.text


def test_what_a_killed_writer_left_is_removed_and_never_loaded(tmp_path):
    save_checkpoint(tmp_path, content(2), keep=2)
    torn = tmp_path / ".step-4.123.tmp"
    torn.mkdir()
    (torn / "draft.safetensors").write_bytes(b"half")

    assert newest_complete(tmp_path) == tmp_path / "step-2"
    assert prune_checkpoints(tmp_path, keep=2) == [torn]
    assert not torn.exists()


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save_checkpoint(tmp_path, content(2), keep=2)
    newer = other_config(content(2))

    save_checkpoint(tmp_path, newer, keep=2)

    assert same(load_checkpoint(tmp_path / "step-2"), newer)
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def test_weights_of_another_run_are_refused_with_what_differs(tmp_path):
    path = save_checkpoint(tmp_path, content(1), keep=2)

    with pytest.raises(CheckpointError, match="vocab_map: expected 'w', found 'v'"):
        load_checkpoint(path, identity=IDENTITY | {"vocab_map": "w"})


def save_for_ever(root: Path, saved) -> None:
    step = 0
    while True:
        save_checkpoint(root, content(step), keep=2)
        saved.value = step
        step += 1


def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """A child saves without end and is killed at ever later moments; what is newest must always verify."""
    context = multiprocessing.get_context("fork")
    for number in range(12):
        root = tmp_path / str(number)
        saved = context.Value("i", -1, lock=False)
        child = context.Process(target=save_for_ever, args=(root, saved), daemon=True)
        child.start()
        deadline = time.monotonic() + 60
        while saved.value < 1 and time.monotonic() < deadline:
            child.join(0.001)
        child.join(0.0013 * number)
        child.kill()
        child.join(30)
        newest = newest_complete(root)
        assert newest is not None
        assert read_state(newest).step >= saved.value
        assert len(list(root.glob("step-*"))) <= 4
