"""One training on any number of ranks: the same global batches give the same curve, also from attempt to attempt."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from disagg_core.run.metrics import read_metrics
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.training.checkpoint import covered_ordinals, newest_complete, read_state
from tests.integration.forks import end, forked_ranks
from tests.integration.training.consumer_kit import Attempt
from tests.kit.waiting import eventually

pytestmark = pytest.mark.integration

SAMPLES, GLOBAL_BATCH = 48, 4
STEPS = SAMPLES // GLOBAL_BATCH
LIMIT_S = 120.0


@dataclass
class Training:
    """A run's checkpoints and metrics, trained by a number of ranks that may differ from attempt to attempt."""

    endpoints: StoreEndpoints
    root: Path
    run_id: str
    save_every_steps: int = 2
    number: int = 0
    processes: list[ForkServerProcess] = field(default_factory=list)

    def attempt(self, size: int, *, until: int | None = None, kill: tuple[int, int, float] | None = None) -> None:
        """Train on `size` ranks to step `until`, or until `kill`: SIGKILL for a rank, so long after a step.

        What is published, up to that step, is what no checkpoint covers, as a producer does.
        """
        self.number += 1
        with Attempt(self.endpoints, self.root, self.run_id, self.number) as attempt:
            covered = covered_ordinals(self.checkpoints)
            last = (until or STEPS) * GLOBAL_BATCH
            attempt.publish([ordinal for ordinal in range(last) if ordinal not in covered])
            self._start(attempt, size)
            if kill is not None:
                self._kill(*kill)
            for process in self.processes:
                process.join(LIMIT_S)
            codes = [process.exitcode for process in self.processes]
            assert None not in codes, f"a rank goes on without the others: {codes}\n{self._logs()}"
            if kill is None:
                assert codes == [0] * size, self._logs()
                assert attempt.writer.in_flight_remote() == attempt.store.key_count() == 0
            else:
                assert 0 not in codes, "the ranks that were left have not noticed"

    def stop(self) -> None:
        """Kill the ranks that are left."""
        for process in self.processes:
            end(process)

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def losses(self) -> list[float]:
        """Return the loss of each step; of a step that was taken again, the last."""
        by_step = {record["step"]: record["loss"] for record in read_metrics(self.root / "train.jsonl")}
        return [float(by_step[step]) for step in range(1, STEPS + 1)]  # type: ignore[arg-type]

    def trained(self) -> tuple[int, list[tuple[int, int]]]:
        """Return the newest checkpoint's count of trained samples and their ordinals."""
        state = read_state(newest_complete(self.checkpoints))
        return state.samples, state.cursor.trained

    def _start(self, attempt: Attempt, size: int) -> None:
        told = self.root / f"told-{self.number}.json"
        training = {
            "batch_size": 1,
            "accumulation_steps": GLOBAL_BATCH // size,
            "save_every_steps": self.save_every_steps,
        }
        told.write_text(
            json.dumps(
                {
                    **attempt.told(),
                    "total_steps": STEPS,
                    "training": training,
                    "checkpoints": str(self.checkpoints),
                    "metrics": str(self.root / "train.jsonl"),
                    "weights": str(self.root / "weights.safetensors"),
                    "outcome": str(self.root / "outcome.json"),
                }
            )
        )
        logs = [self._log(rank) for rank in range(size)]
        self.processes = forked_ranks("tests.integration.training.rank_main", [str(told)], logs)

    def _kill(self, rank: int, step: int, delay_s: float) -> None:
        eventually(
            lambda: self._has_reached(step),
            self._logs,
            within_s=LIMIT_S,
            every_s=0.01,
            alive=lambda: all(process.is_alive() for process in self.processes),
        )
        threading.Event().wait(delay_s)
        assert self.processes[rank].is_alive(), "it was over before"
        self.processes[rank].kill()

    def _has_reached(self, step: int) -> bool:
        """Whether `step` is trained; 0 is the first checkpoint: no agent ends ranks that wait to meet a dead one."""
        if step == 0:
            return any(self.checkpoints.glob("*step-0*"))
        return any(record["step"] == step for record in read_metrics(self.root / "train.jsonl"))

    def _log(self, rank: int) -> Path:
        return self.root / f"rank-{self.number}-{rank}.log"

    def _logs(self) -> str:
        return "\n".join(self._log(rank).read_text()[-3000:] for rank in range(len(self.processes)))


@pytest.fixture
def new_training(endpoints: StoreEndpoints, tmp_path: Path, run_id: str):
    """Begin trainings; what is left of them at the end is killed."""
    begun: list[Training] = []

    def begin(name: str, **options: int) -> Training:
        (tmp_path / name).mkdir()
        begun.append(Training(endpoints, tmp_path / name, f"{run_id}-{name}", **options))
        return begun[-1]

    yield begin
    for training in begun:
        training.stop()


@pytest.mark.slow
def test_one_two_and_four_ranks_have_the_same_curve_also_one_after_the_other(new_training):
    curves = {}
    for size in (1, 2, 4):
        training = new_training(f"{size}")
        training.attempt(size)
        assert training.trained() == (SAMPLES, [(0, SAMPLES - 1)])
        curves[size] = training.losses()

    relay = new_training("relay")
    for size, until in ((1, 3), (2, 6), (4, 9), (1, None)):
        relay.attempt(size, until=until)
    assert relay.trained() == (SAMPLES, [(0, SAMPLES - 1)])

    assert max(curves[1]) - min(curves[1]) > 0.1
    for curve in (curves[2], curves[4], relay.losses()):
        assert curve == pytest.approx(curves[1], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("sizes", "seed"),
    [((2,), 0), *(pytest.param((2, 4, 2), seed, marks=pytest.mark.slow) for seed in range(1, 5))],
)
def test_after_random_kills_of_ranks_each_sample_is_in_the_cursor_once(new_training, sizes, seed):
    drawn = random.Random(seed)
    moments = sorted(drawn.sample(range(STEPS - 2), len(sizes)))
    kills = [(drawn.randrange(size), step, drawn.uniform(0, 0.1)) for size, step in zip(sizes, moments, strict=True)]
    print(f"seed {seed}: {kills}")  # with the output of a test that fails
    calm, storm = new_training("calm"), new_training("storm")
    calm.attempt(1)

    for size, kill in zip(sizes, kills, strict=True):
        storm.attempt(size, kill=kill)
    storm.attempt(2)

    assert storm.trained() == calm.trained() == (SAMPLES, [(0, SAMPLES - 1)])
    assert storm.losses() == pytest.approx(calm.losses(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("sizes", "seed"), [((2,), 10), *(pytest.param((1, 2, 4, 2, 1), n, marks=pytest.mark.slow) for n in range(11, 15))]
)
def test_a_run_killed_while_it_saves_goes_on_on_another_number_of_ranks(new_training, sizes, seed):
    """It saves after every step, so that whenever it is killed a checkpoint is being written, or was just begun."""
    drawn = random.Random(seed)
    moments = sorted(drawn.sample(range(1, STEPS - 2), len(sizes)))
    kills = [(drawn.randrange(size), step, drawn.uniform(0, 0.05)) for size, step in zip(sizes, moments, strict=True)]
    print(f"seed {seed}: {kills}")  # with the output of a test that fails
    calm, storm = new_training("calm"), new_training("storm", save_every_steps=1)
    calm.attempt(1)

    for size, kill in zip(sizes, kills, strict=True):
        storm.attempt(size, kill=kill)
        found = newest_complete(storm.checkpoints)
        assert found is not None
        state = read_state(found)
        assert state.cursor.trained == ([(0, state.step * GLOBAL_BATCH - 1)] if state.step else [])
    storm.attempt(4 if sizes[-1] == 2 else 2)

    assert storm.trained() == calm.trained() == (SAMPLES, [(0, SAMPLES - 1)])
    assert storm.losses() == pytest.approx(calm.losses(), rel=1e-5, abs=1e-5)
    assert not list(storm.checkpoints.glob(".step-*"))
