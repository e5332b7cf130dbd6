"""Drafts are measured on held-out samples while they are trained: it changes no bit, marks the best, and may stop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from disagg_core.contracts import sample_id_of
from disagg_core.errors import DamagedHeldOut, Preempted
from disagg_core.run.heldout import HeldOutFiles
from disagg_core.run_spec.document import EarlyStopSection, HeldOutSection
from disagg_core.training.checkpoint import newest_complete, read_state
from disagg_core.training.distributed import Ranks
from disagg_core.training.heldout import HeldOutPlan
from disagg_core.training.observers import MetricsObserver
from tests.integration.forks import run_ranks
from tests.integration.training.consumer_kit import Attempt, consumer, identity_of, sample, section
from tests.integration.training.test_fit import StopWhen

pytestmark = pytest.mark.integration

HELD_OUT = range(1000, 1005)


@pytest.fixture
def ranks():
    with Ranks.join("cpu") as joined:
        yield joined


def held_out(folder: Path, *, every: int = 2, patience: int | None = None) -> HeldOutPlan:
    """Held-out samples that are not among those of the stream, as a producer captures them."""
    files = HeldOutFiles(folder, identity_of("r"))
    if files.count is None:
        files.write((sample_id_of(ordinal), sample(ordinal)) for ordinal in HELD_OUT)
    stop = EarlyStopSection(patience=patience) if patience is not None else None
    return HeldOutPlan(files, HeldOutSection(every_steps=every), stop)


class Measured(MetricsObserver):
    """Keeps what is measured."""

    def __init__(self, root: Path) -> None:
        super().__init__(root / "train.jsonl", heldout=root / "heldout.jsonl")
        self._path = root / "heldout.jsonl"

    @property
    def records(self) -> list[dict]:
        return [json.loads(line) for line in self._path.read_text().splitlines()]


def test_measuring_changes_no_bit_of_training_and_its_figures_are_those_of_the_same_samples(
    endpoints, ranks, tmp_path, run_id
):
    weights = []
    for number, plan in ((1, None), (2, held_out(tmp_path / "heldout"))):
        with Attempt(endpoints, tmp_path, run_id, number) as attempt:
            attempt.publish(range(18))
            observer = Measured(tmp_path)
            trainer, loader = consumer(
                attempt.reader,
                attempt.store,
                ranks,
                checkpoints=tmp_path / f"{number}",
                heldout=plan,
                observer=observer,
            )
            outcome = trainer.fit(loader)
            weights.append(trainer.trainees[0].weights())
            assert (outcome.reason, outcome.steps) == ("end of stream", 5)

    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [record["step"] for record in observer.records] == [2, 4, 5]
    for record in observer.records:
        assert len(record["accuracies"]) == 3
        assert record["simulated_accept_length"] >= 1
    losses = [record["loss"] for record in observer.records]
    best = min(zip(losses, (2, 4, 5), strict=True))
    state = read_state(newest_complete(tmp_path / "2"))
    kept = state.drafts[""].best
    assert (kept.step, kept.value, kept.figure) == (best[1], best[0], "loss")
    assert (tmp_path / "2" / f"step-{kept.step}" / "manifest.json").is_file()
    files = [(tmp_path / run / "step-5" / "optimizer.safetensors").read_bytes() for run in "12"]
    assert files[0] == files[1]


def test_a_run_that_goes_on_measures_what_an_undisturbed_one_measures(endpoints, ranks, tmp_path, run_id):
    found = {}
    for name, stops in (("calm", False), ("stopped", True)):
        root = tmp_path / name
        observer = Measured(root)
        ordinals = range(24)
        for number in (1, 2) if stops else (1,):
            with Attempt(endpoints, root, f"{run_id}-{name}", number) as attempt:
                ended = not stops or number == 2
                attempt.publish(ordinals[:12] if not ended else ordinals, ended=ended)
                trainer, loader = consumer(
                    attempt.reader,
                    attempt.store,
                    ranks,
                    checkpoints=root / "checkpoints",
                    heldout=held_out(root / "heldout", every=1),
                    observer=observer,
                )
                if ended:
                    trainer.fit(loader)
                    continue
                stop = StopWhen(loader, lambda channel=attempt.reader: channel.in_flight_remote() == 0)
                trainer._observer.on_wait = stop.on_wait
                with pytest.raises(Preempted):
                    trainer.fit(loader)
                del observer.on_wait
                ordinals = range(12, 24)
        found[name] = [(r["step"], r["loss"], r["best_step"], r["since_best"]) for r in observer.records]

    assert found["stopped"] == found["calm"]
    assert [step for step, *_ in found["calm"]] == [1, 2, 3, 4, 5, 6]


def test_training_that_gets_no_further_stops_tells_the_producer_and_names_its_best(endpoints, ranks, tmp_path, run_id):
    """At so high a rate the held-out loss climbs; what is left of the stream is not used, and another attempt ends."""
    training = section(learning_rate=0.5, warmup_ratio=0.0, save_every_steps=100)
    plan = held_out(tmp_path / "heldout", every=1, patience=2)
    with Attempt(endpoints, tmp_path, run_id, 1) as attempt:
        attempt.publish(range(80), ended=False)
        observer = Measured(tmp_path)
        trainer, loader = consumer(
            attempt.reader,
            attempt.store,
            ranks,
            training=training,
            total_steps=20,
            checkpoints=tmp_path / "c",
            heldout=plan,
            observer=observer,
            keep=1,
        )
        outcome = trainer.fit(loader)

        best = outcome.drafts[""].best
        assert (outcome.reason, best.since) == ("early_stop", 2)
        assert best.step == outcome.steps - 2
        assert best.value == min(record["loss"] for record in observer.records)
        assert outcome.unused == 80 - outcome.samples
        status = attempt.writer.reader_status()
        assert (status.state, status.reason) == ("done", "early_stop")
        assert attempt.store.key_count() == attempt.writer.in_flight_remote() == outcome.unused
    kept = {path.name for path in (tmp_path / "c").iterdir()}
    assert kept == {"step-0", f"step-{best.step}", f"step-{outcome.steps}"}

    with Attempt(endpoints, tmp_path, run_id, 2) as attempt:
        attempt.publish(range(outcome.samples, 80), ended=False)
        trainer, loader = consumer(
            attempt.reader, attempt.store, ranks, training=training, checkpoints=tmp_path / "c", heldout=plan, keep=1
        )
        again = trainer.fit(loader)
        assert (again.reason, again.steps_here, again.drafts[""].best) == ("early_stop", 0, best)


def test_held_out_samples_that_are_not_there_end_the_fit_by_name(endpoints, ranks, tmp_path, run_id):
    plan = held_out(tmp_path / "heldout")
    (tmp_path / "heldout" / "manifest.json").unlink()
    with Attempt(endpoints, tmp_path, run_id) as attempt:
        attempt.publish(range(8))
        trainer, loader = consumer(attempt.reader, attempt.store, ranks, checkpoints=tmp_path / "c", heldout=plan)
        with pytest.raises(DamagedHeldOut, match="expected the producer to have captured them"):
            trainer.fit(loader)
    assert newest_complete(tmp_path / "c").name == "step-2", "what was trained is saved"


def test_two_ranks_measure_what_one_does(endpoints, ranks, tmp_path, run_id):
    """Five samples on two ranks: one of them has fewer, and takes part all the same."""
    found = {}
    for size in (1, 2):
        root = tmp_path / f"{size}"
        held_out(root / "heldout")
        with Attempt(endpoints, root, f"{run_id}-{size}") as attempt:
            attempt.publish(range(16))
            told = root / "told.json"
            told.write_text(
                json.dumps(
                    {
                        **attempt.told(),
                        "total_steps": 6,
                        "metrics": str(root / "train.jsonl"),
                        "heldout": str(root / "heldout"),
                        "heldout_metrics": str(root / "heldout.jsonl"),
                        "training": {"accumulation_steps": 2 // size},
                        "checkpoints": str(root / "checkpoints"),
                        "weights": str(root / "weights.safetensors"),
                        "outcome": str(root / "outcome.json"),
                    }
                )
            )
            run_ranks(size, "tests.integration.training.rank_main", [str(told)], root / "ranks.log")
        found[size] = [json.loads(line) for line in (root / "heldout.jsonl").read_text().splitlines()]

    assert [record["step"] for record in found[1]] == [2, 4]
    for one, two in zip(found[1], found[2], strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["accuracies"] == pytest.approx(one["accuracies"], abs=1e-6)
        assert two["best_step"] == one["best_step"]
