"""Ranks that share samples train what one rank trains that has them alone: losses, figures, weights, accounts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from disagg_core.drafts.registry import method_names, method_of
from disagg_core.run.metrics import read_metrics
from disagg_core.training.checkpoint import covered_ordinals, newest_complete, read_state
from tests.integration.forks import run_ranks
from tests.integration.training.consumer_kit import Attempt
from tests.integration.training.test_heldout import held_out

pytestmark = pytest.mark.integration

ABLE = [name for name in method_names() if method_of(name).context_parallel]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [name if name == "dflash" else pytest.param(name, marks=pytest.mark.slow) for name in ABLE]
)
def test_the_parts_of_a_packed_row_add_up_to_it(name: str, size: int, tmp_path: Path) -> None:
    run_ranks(size, "tests.integration.training.context_rank_main", [name], tmp_path / "log", limit_s=300.0)


SAMPLES, WINDOW = 17, 4
"""A last window of one sample; lengths are 8 to 20 tokens."""
FIGURES = ("loss", "step_losses", "accuracies", "acceptance_rates", "simulated_accept_length", "grad_norm")
COUNTS = ("step", "samples", "tokens")


class Run:
    """A run, trained by ranks whose number, and how many of them share a sample, may differ between attempts."""

    def __init__(self, endpoints: Any, root: Path, run_id: str) -> None:
        self.endpoints, self.root, self.run_id, self.number = endpoints, root, run_id, 0
        root.mkdir()
        held_out(root / "heldout")

    def attempt(self, ranks: int, shared_by: int, *, until: int = SAMPLES, **told: Any) -> dict[str, int]:
        """Train the samples before ordinal `until` that no checkpoint covers; return the outcome."""
        self.number += 1
        training = {
            "batch_size": 2,
            "accumulation_steps": WINDOW // 2 * shared_by // ranks,
            "processes": ranks,
            "context_parallel": shared_by,
            "save_every_steps": 2,
        }
        told |= {
            "total_steps": 6,
            "training": training,
            "checkpoints": str(self.root / "checkpoints"),
            "metrics": str(self.root / "train.jsonl"),
            "heldout": str(self.root / "heldout"),
            "heldout_metrics": str(self.root / "heldout.jsonl"),
            "weights": str(self.root / "weights.safetensors"),
            "outcome": str(self.root / "outcome.json"),
        }
        covered = covered_ordinals(self.root / "checkpoints")
        with Attempt(self.endpoints, self.root, self.run_id, self.number) as attempt:
            attempt.publish([ordinal for ordinal in range(until) if ordinal not in covered])
            file = self.root / "told.json"
            file.write_text(json.dumps({**attempt.told(), **told}))
            log = self.root / f"{self.number}.log"
            run_ranks(ranks, "tests.integration.training.rank_main", [str(file)], log, limit_s=300.0)
            assert attempt.writer.in_flight_remote() == attempt.store.key_count() == 0
        outcome: dict[str, int] = json.loads((self.root / "outcome.json").read_text())
        return outcome

    @property
    def steps(self) -> list[dict[str, Any]]:
        """What was recorded of each step."""
        return list(read_metrics(self.root / "train.jsonl"))

    @property
    def weights(self) -> dict[str, Tensor]:
        """The draft of the newest checkpoint, which is what an export is made of."""
        newest = newest_complete(self.root / "checkpoints")
        assert newest is not None
        return load_file(newest / "draft.safetensors")

    @property
    def heldout(self) -> list[dict[str, Any]]:
        """What was measured."""
        return [json.loads(line) for line in (self.root / "heldout.jsonl").read_text().splitlines()]


def assert_trained_alike(run: Run, alone: Run) -> None:
    """Figures and weights are the same, but for the order of sums."""
    for found, expected in zip(run.steps, alone.steps, strict=True):
        assert [found[name] for name in COUNTS] == [expected[name] for name in COUNTS]
        for name in FIGURES:
            assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), (found["step"], name)
    for found, expected in zip(run.heldout, alone.heldout, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)
        assert found["accuracies"] == pytest.approx(expected["accuracies"], rel=1e-5, abs=1e-6)
    weights = run.weights
    for name, weight in alone.weights.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_two_ranks_that_share_samples_train_what_one_does_also_one_after_the_other(
    endpoints: Any, tmp_path: Path, run_id: str, ranks: int
) -> None:
    """Four ranks are two pairs, which share out the samples of a window between them."""
    alone = Run(endpoints, tmp_path / "alone", f"{run_id}-alone")
    relay = Run(endpoints, tmp_path / "relay", f"{run_id}-relay")
    outcome = alone.attempt(1, 1)

    relay.attempt(1, 1, until=2 * WINDOW)
    relayed = relay.attempt(ranks, 2)

    assert relayed == outcome == {"steps": 5, "samples": SAMPLES, "lost": 0}
    assert read_state(newest_complete(relay.root / "checkpoints")).cursor.trained == [(0, SAMPLES - 1)]
    assert_trained_alike(relay, alone)


def test_a_sample_that_one_rank_has_lost_is_left_out_by_those_that_share_it(
    endpoints: Any, tmp_path: Path, run_id: str
) -> None:
    alone = Run(endpoints, tmp_path / "alone", f"{run_id}-alone")
    pair = Run(endpoints, tmp_path / "pair", f"{run_id}-pair")

    outcome = alone.attempt(1, 1, lossy_rank=0, lost=6)
    shared = pair.attempt(2, 2, lossy_rank=1, lost=6)

    assert shared == outcome == {"steps": 5, "samples": SAMPLES - 1, "lost": 1}
    assert_trained_alike(pair, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLE)
@pytest.mark.parametrize(
    ("options", "alone", "within"),
    [({"compile": True}, {}, 1e-5), ({"precision": "bfloat16"}, {"precision": "bfloat16"}, 1e-3)],
    ids=["compiled", "bfloat16"],
)
def test_two_ranks_that_share_samples_have_the_curve_of_one_also_compiled_and_in_bf16(
    name: str, options: dict[str, Any], alone: dict[str, Any], within: float, tmp_path: Path
) -> None:
    """Compiled ones that of an uncompiled one. In bf16 a rank rounds sums of its part, not those of the whole row."""
    losses = {}
    for ranks, chosen in ((1, alone), (2, options)):
        program = "tests.integration.training.context_options_main"
        losses_to, weights_to = (str(tmp_path / f"{ranks}.{what}") for what in ("json", "safetensors"))
        arguments = [name, losses_to, weights_to, json.dumps(chosen)]
        run_ranks(ranks, program, arguments, tmp_path / f"{ranks}.log", limit_s=300.0)
        losses[ranks] = json.loads(Path(losses_to).read_text())

    assert losses[2] == pytest.approx(losses[1], rel=within)
    if "compile" in options:
        one, two = (load_file(tmp_path / f"{ranks}.safetensors") for ranks in (1, 2))
        for tensor_name, weight in one.items():
            torch.testing.assert_close(two[tensor_name], weight, rtol=1e-5, atol=1e-5, msg=tensor_name)
