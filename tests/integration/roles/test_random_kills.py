"""A run whose roles are killed at any moment ends with the bits of one that nothing happened to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from disagg_core.run.plan import RunPlan
from disagg_core.run_spec.document import RunSpec
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.training.checkpoint import newest_complete, read_state
from tasks.roles import Role
from tests.integration.conftest import plan_of
from tests.integration.roles.night import BOTH, Kill, Night
from tests.integration.rollout.rollout_kit import write_prompts

pytestmark = pytest.mark.integration

PROMPTS, EPOCHS, WINDOW = 20, 2, 4
STEPS = PROMPTS * EPOCHS // WINDOW

MakePlan = Callable[[str], RunPlan]


@pytest.fixture(scope="module")
def make_plan(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> MakePlan:
    """Plan a run of two shuffled epochs whose answers are drawn from the target, saved at every other step."""
    root = tmp_path_factory.mktemp("kills")
    prompts = write_prompts(root / "prompts.jsonl", PROMPTS)

    def make(name: str) -> RunPlan:
        spec = RunSpec.model_validate(
            {
                "target": {"model": str(model_dir), "dtype": "float32", "device": "cpu", "cpu_threads": 1},
                "draft": {"ttt_length": 2},
                "data": {
                    "prompts": str(prompts),
                    "max_tokens": 96,
                    "epochs": EPOCHS,
                    "generate": {"max_new_tokens": 16, "temperature": 0.9},
                },
                "rollout": {"batch_tokens": 256, "high_watermark_refs": 2 * WINDOW},
                "store": {"capacity": 64 << 20},
                "training": {
                    "batch_size": WINDOW, "save_every_steps": 2, "learning_rate": 1e-2, "device": "cpu",
                    "cpu_threads": 1,
                },
                "evaluation": {"prompts": 0},
            }
        )  # fmt: skip
        (root / name).mkdir()
        return plan_of(spec, root / name)

    return make


@pytest.fixture(scope="module")
def calm(make_plan: MakePlan, endpoints: StoreEndpoints) -> Path:
    """The last checkpoint of a run that nothing happened to."""
    night = Night(make_plan("calm"), endpoints)
    night.run()
    assert (night.attempt, night.restarts) == (1, 0)
    return last_checkpoint(night)


@pytest.mark.parametrize(
    ("victims", "seed"),
    [*(pytest.param((one,), seed, marks=pytest.mark.slow) for seed, one in enumerate(BOTH, start=1)), (BOTH, 3)],
)
def test_a_run_with_a_role_killed_at_a_random_moment_ends_with_the_same_bits(
    make_plan: MakePlan, endpoints: StoreEndpoints, calm: Path, victims: tuple[Role, ...], seed: int
) -> None:
    night = Night(make_plan(f"one-{'-'.join(victims)}"), endpoints)
    night.run(Kill.at_random(victims, STEPS - 2, 1, seed))
    assert_same_end(night, calm)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("victims", [("consumer",), ("producer",), BOTH])
def test_a_run_with_roles_killed_at_three_random_moments_ends_with_the_same_bits(
    make_plan: MakePlan, endpoints: StoreEndpoints, calm: Path, victims: tuple[Role, ...], seed: int
) -> None:
    night = Night(make_plan(f"three-{'-'.join(victims)}-{seed}"), endpoints)
    night.run(Kill.at_random(victims, STEPS, 3, seed))
    assert_same_end(night, calm)


def last_checkpoint(night: Night) -> Path:
    """Return the checkpoint of the last step; nothing of the run is left in the store."""
    checkpoint = newest_complete(night.plan.dir.checkpoints)
    assert checkpoint is not None
    assert checkpoint.name == f"step-{STEPS}"
    return checkpoint


def assert_same_end(night: Night, calm: Path) -> None:
    """Weights, optimizer state and trained ids are those of the run that nothing happened to."""
    assert any(alive for _, alive in night.struck), "nobody was killed"
    found = last_checkpoint(night)
    state, expected = read_state(found), read_state(calm)
    assert state.cursor.trained == expected.cursor.trained == [(0, PROMPTS * EPOCHS - 1)]
    assert (state.step, state.cursor) == (expected.step, expected.cursor)
    for file in ("draft.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(found / file), load_file(calm / file)
        assert ours.keys() == theirs.keys()
        differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
        assert not differing, (file, differing, night.struck)
