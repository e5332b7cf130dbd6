"""Several drafts on one stream: each ends as it would have ended alone, and all of them in one checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from disagg_core.contracts import sample_id_of
from disagg_core.errors import TrainingDiverged
from disagg_core.run.metrics import read_metrics
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.training.checkpoint import load_checkpoint, newest_complete, read_state
from disagg_core.training.distributed import Ranks
from disagg_core.training.observers import MetricsObserver, Observers
from disagg_core.training.trainee import Trainee
from tests.contract.drafts.kit import Case
from tests.integration.forks import run_ranks
from tests.integration.training.company_kit import Stream, consumer_of, reader_of

pytestmark = pytest.mark.integration

SAMPLES = 10
Weights = dict[str, Tensor]


@pytest.fixture
def ranks():
    with Ranks.join("cpu") as joined:
        yield joined


class Trained:
    """Each draft's final weights, and how the fit went."""

    def __init__(self, endpoints, folder: Path, run_id: str, ranks: Ranks, methods: Sequence[str], **options) -> None:
        not_finite, training = options.pop("not_finite", {}), options.pop("training", None)
        ordinals = options.pop("ordinals", range(SAMPLES))
        cases = [Case.of(name) for name in methods]
        with Stream(endpoints, folder, run_id, cases) as stream, reader_of(stream.url, run_id, ranks) as reader:
            stream.publish(list(ordinals))
            self.trainer, loader = consumer_of(reader, stream.store, ranks, cases, training=training, **options)
            for trainee in self.trainer.trainees:
                spoil(trainee, not_finite.get(trainee.folder, ()))
            self.outcome = self.trainer.fit(loader)
            self.left = (stream.store.key_count(), stream.writer.in_flight_remote())
            self.gets = stream.store.counters["gets"]
        self.weights = {n: t.weights() for n, t in zip(methods, self.trainer.trainees, strict=True)}


def spoil(trainee: Trainee, windows: Sequence[int]) -> None:
    """Have a draft's loss overflow in these of its windows."""
    run, module, seen = trainee.step.run, trainee.step._module, []

    def spoilt(batch, normalisers):
        output = module(batch, normalisers)
        return replace(output, total=output.total * float("inf")) if len(seen) - 1 in windows else output

    trainee.step._module = spoilt
    trainee.step.run = lambda window, step, **counts: (seen.append(window), run(window, step, **counts))[1]


def same(left: Weights, right: Weights) -> bool:
    return left.keys() == right.keys() and all(torch.equal(weight, right[name]) for name, weight in left.items())


METHODS = ["eagle3", "dflash", "dflash2", "dspark"]


def test_a_draft_in_company_ends_with_the_bits_that_it_has_alone(endpoints, ranks, tmp_path, run_id):
    """They read other layers, and one of them no last hidden state; each sample is fetched once for all."""
    cases = [Case.of(name) for name in METHODS]
    assert len({case.capture for case in cases}) > 1
    together = Trained(endpoints, tmp_path / "all", run_id, ranks, METHODS)

    assert together.left == (0, 0)
    assert (together.outcome.steps, together.outcome.samples, together.gets) == (3, SAMPLES, SAMPLES)
    for name in METHODS:
        alone = Trained(endpoints, tmp_path / name, f"{run_id}-{name}", ranks, [name])
        assert same(together.weights[name], alone.weights[name]), name
        assert together.outcome.drafts[name].loss_last == alone.outcome.drafts[""].loss_last


@pytest.mark.slow
def test_two_ranks_train_a_company_to_the_bits_that_each_has_alone(endpoints: StoreEndpoints, tmp_path, run_id):
    companies = [["eagle3", "dflash"], ["eagle3"], ["dflash"]]
    told, streams = [], []
    for number, methods in enumerate(companies):
        folder = tmp_path / str(number)
        folder.mkdir()
        stream = Stream(endpoints, folder, f"{run_id}-{number}", [Case.of(name) for name in methods])
        stream.publish(range(SAMPLES))
        streams.append(stream)
        said = {"run_id": stream.run_id, "url": str(stream.url), "methods": methods, "weights": str(folder)}
        told.append(said)
    (tmp_path / "told.json").write_text(json.dumps({"store": endpoints.model_dump(), "companies": told}))

    program = "tests.integration.training.company_rank_main"
    run_ranks(2, program, [str(tmp_path / "told.json")], tmp_path / "ranks.log")

    for stream in streams:
        with stream:
            assert (stream.store.key_count(), stream.writer.in_flight_remote()) == (0, 0)
    for number, name in ((1, "eagle3"), (2, "dflash")):
        weights, alone = (load_file(tmp_path / folder / f"{name}.safetensors") for folder in ("0", str(number)))
        assert same(weights, alone), name


def test_an_interrupted_company_ends_with_the_same_bits(endpoints, ranks, tmp_path, run_id):
    """Interrupted between the steps of two drafts: what the first had done of that window is done again, not twice."""
    methods = ["eagle3", "dflash"]
    calm = Trained(endpoints, tmp_path / "calm", f"{run_id}-calm", ranks, methods)
    checkpoints = tmp_path / "checkpoints"
    cases = [Case.of(name) for name in methods]
    first = f"{run_id}-1"
    with (
        Stream(endpoints, tmp_path / "1", first, cases) as stream,
        reader_of(stream.url, first, ranks) as reader,
    ):
        stream.publish(range(SAMPLES))
        training = {"save_every_steps": 1}
        trainer, loader = consumer_of(reader, stream.store, ranks, cases, checkpoints=checkpoints, training=training)
        run = trainer.trainees[1].step.run
        trainer.trainees[1].step.run = lambda window, step, **counts: (
            run(window, step, **counts) if step < 1 else pytest.fail("killed")
        )
        with pytest.raises(pytest.fail.Exception):
            trainer.fit(loader)
    newest = newest_complete(checkpoints)
    assert read_state(newest).cursor.trained == [(0, 3)]
    assert {draft.step for draft in read_state(newest).drafts.values()} == {1}

    again = Trained(
        endpoints, tmp_path / "2", f"{run_id}-2", ranks, methods, ordinals=range(4, SAMPLES), checkpoints=checkpoints
    )

    assert (again.outcome.steps, again.outcome.samples, again.outcome.samples_here) == (3, SAMPLES, SAMPLES - 4)
    assert all(same(again.weights[name], calm.weights[name]) for name in methods)
    saved = load_checkpoint(newest_complete(checkpoints))
    assert saved.state.cursor.trained == [(0, SAMPLES - 1)]
    assert all(same(saved.drafts[name].weights, calm.weights[name]) for name in methods)


def test_a_window_that_is_not_finite_for_one_draft_is_trained_by_the_other(endpoints, ranks, tmp_path, run_id):
    methods = ["eagle3", "dflash"]
    files = {name: tmp_path / f"{name}.jsonl" for name in methods}
    observer = Observers(*(MetricsObserver(path, name) for name, path in files.items()))
    spoilt = Trained(
        endpoints, tmp_path / "a", f"{run_id}-a", ranks, methods, not_finite={"eagle3": [1]}, observer=observer
    )
    whole = Trained(endpoints, tmp_path / "b", f"{run_id}-b", ranks, ["dflash"])
    left_out = [n for n in range(SAMPLES) if n not in range(4, 8)]
    without = Trained(endpoints, tmp_path / "c", f"{run_id}-c", ranks, ["eagle3"], ordinals=left_out)

    drafts = spoilt.outcome.drafts
    assert (spoilt.outcome.steps, spoilt.outcome.samples, spoilt.outcome.quarantined) == (3, SAMPLES, 0)
    assert (spoilt.outcome.skipped, drafts["eagle3"].skipped, drafts["dflash"].skipped) == (0, 1, 0)
    assert (drafts["eagle3"].step, drafts["dflash"].step) == (2, 3)
    assert same(spoilt.weights["dflash"], whole.weights["dflash"])
    assert same(spoilt.weights["eagle3"], without.weights["eagle3"])
    assert [record["step"] for record in read_metrics(files["eagle3"])] == [1, 2]
    assert [record["step"] for record in read_metrics(files["dflash"])] == [1, 2, 3]
    assert "selector_loss" not in next(read_metrics(files["dflash"]))


def test_a_draft_that_diverges_ends_the_run_and_is_named(endpoints, ranks, tmp_path, run_id):
    with pytest.raises(TrainingDiverged, match=r"draft eagle3: step 0: expected a finite loss.*2 windows in a row"):
        Trained(
            endpoints,
            tmp_path,
            run_id,
            ranks,
            ["eagle3", "dflash"],
            not_finite={"eagle3": [0, 1]},
            training={"max_diverged_windows": 2},
        )


def test_a_window_that_is_finite_for_no_draft_is_quarantined(endpoints, ranks, tmp_path, run_id):
    methods = ["eagle3", "dflash"]

    outcome = Trained(endpoints, tmp_path, run_id, ranks, methods, not_finite={name: [1] for name in methods}).outcome

    assert (outcome.steps, outcome.samples, outcome.quarantined, outcome.skipped) == (2, SAMPLES - 4, 4, 1)
    assert {name for name, _ in outcome.given_up} == {sample_id_of(n) for n in range(4, 8)}
