"""Two ranks compute what one does: the same windows give the same weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from disagg_core.training.checkpoint import newest_complete, read_state
from disagg_core.training.distributed import Ranks
from tests.integration.forks import run_ranks
from tests.integration.training.consumer_kit import Attempt, consumer, section

pytestmark = pytest.mark.integration

RESHARD = "tests.integration.training.reshard_main"
WAITING = "tests.integration.training.waiting_main"
MUON = "tests.integration.training.muon_rank_main"


@pytest.mark.parametrize(
    ("saving", "loading", "how"), [(1, 2, "adamw"), (2, 1, "adamw"), (2, 3, "muon"), (3, 2, "offloaded")]
)
def test_what_some_ranks_saved_any_number_can_load(tmp_path: Path, saving: int, loading: int, how: str):
    run_ranks(saving, RESHARD, ["save", str(tmp_path), how], tmp_path / "save.log")
    run_ranks(loading, RESHARD, ["load", str(tmp_path), how], tmp_path / "load.log")


def test_muon_updates_rows_on_several_ranks_with_the_bits_of_one(tmp_path: Path):
    for size in (1, 2, 3):
        run_ranks(size, MUON, [str(tmp_path)], tmp_path / f"{size}.log")

    one, two, three = (load_file(tmp_path / f"{size}") for size in (1, 2, 3))

    for name, tensor in one.items():
        assert torch.equal(two[name], tensor), name
        assert torch.equal(three[name], tensor), name


def test_two_ranks_end_with_the_weights_of_one(endpoints, tmp_path, run_id):
    """Windows of four, the last one short so that a rank has nothing to do, one sample lost on the way."""
    lost = 9
    with Attempt(endpoints, tmp_path, f"{run_id}-one") as alone, Ranks.join("cpu") as ranks:
        refs = alone.publish(range(17))
        alone.store.abort(refs[lost])
        trainer, loader = consumer(alone.reader, alone.store, ranks, training=section(accumulation_steps=2))
        one = trainer.fit(loader)
        expected = trainer.trainees[0].weights()

    with Attempt(endpoints, tmp_path / "two", f"{run_id}-two") as pair:
        told = tmp_path / "two.json"
        told.write_text(
            json.dumps(
                {
                    **pair.told(),
                    "total_steps": 6,
                    "metrics": str(tmp_path / "train.jsonl"),
                    "training": {"accumulation_steps": 1},
                    "checkpoints": str(tmp_path / "checkpoints"),
                    "weights": str(tmp_path / "two.safetensors"),
                    "outcome": str(tmp_path / "outcome.json"),
                }
            )
        )
        refs = pair.publish(range(17))
        pair.store.abort(refs[lost])
        run_ranks(2, "tests.integration.training.rank_main", [str(told)], tmp_path / "two.log")

        assert pair.writer.in_flight_remote() == 0
        assert pair.store.key_count() == 0

    assert (one.steps, one.samples, one.lost) == (5, 16, 1)
    assert json.loads((tmp_path / "outcome.json").read_text()) == {"steps": 5, "samples": 16, "lost": 1}
    two = load_file(tmp_path / "two.safetensors")
    assert two.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-5, atol=1e-6)
    newest = newest_complete(tmp_path / "checkpoints")
    assert read_state(newest).cursor.trained == [(0, 8), (10, 16)]
    saved = load_file(newest / "draft.safetensors")
    assert all(torch.equal(saved[name], two[name]) for name in two)


def test_no_rank_goes_on_before_rank_0_has_written_the_checkpoint(tmp_path: Path):
    """One that left would have torchrun end rank 0 in the middle of it."""
    run_ranks(2, WAITING, ["save", str(tmp_path)], tmp_path / "log")

    assert (tmp_path / "rank 1 went on").read_text() == "complete: True"


def test_all_ranks_know_that_rank_0_could_not_write_the_checkpoint(tmp_path: Path):
    run_ranks(2, WAITING, ["fail", str(tmp_path)], tmp_path / "log")

    assert (tmp_path / "rank 0").read_text() == "MemoryError  no room"
    assert (tmp_path / "rank 1").read_text() == "RoleFailed out_of_memory rank 0 failed: MemoryError: no room"


@pytest.mark.parametrize("act", ["stop", "stop unsettled"])
def test_one_rank_that_is_asked_to_stop_while_all_wait_for_references_stops_all_at_once(tmp_path: Path, act: str):
    """Also while rank 0 waits for the channel's disk."""
    run_ranks(2, WAITING, [act, str(tmp_path)], tmp_path / "log")

    assert float((tmp_path / "seconds").read_text()) < 2.0
