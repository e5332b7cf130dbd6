"""Child of the tests of draft methods under several ranks: two steps on one rank's share; rank 0 saves the weights."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from disagg_core.drafts.method import DraftModel
from disagg_core.run_spec.document import TrainingSection
from disagg_core.training.distributed import Ranks, shard
from disagg_core.training.inputs import DraftBatches
from disagg_core.training.optimizer import Schedule
from disagg_core.training.state import gather_weights
from disagg_core.training.step import OptimizerStep
from tests.contract.drafts.kit import SEED, Case

WINDOWS = (((0, 18), (1, 25), (2, 12)), ((3, 30),))
"""Ordinals and lengths of the samples of each step; the second leaves one of two ranks without any."""


def main(name: str, folder: Path) -> None:
    """Run one rank with the draft method called `name`."""
    torch.set_num_threads(1)
    with Ranks.join("cpu") as ranks:
        case = Case.of(name)
        draft = case.draft()
        step = step_of(case, draft, ranks)
        for number, window in enumerate(WINDOWS):
            batches, counts = window_of(case, window[ranks.rank :: ranks.size])
            assert step.run(batches, number, **counts) is not None
        weights = gather_weights(draft, draft.serving_state_dict())
        if ranks.is_first:
            save_file(weights, folder / f"{ranks.size}.safetensors")


def step_of(case: Case, draft: DraftModel, ranks: Ranks, **training: Any) -> OptimizerStep:
    """Return the optimizer step of `draft`, sharded, with `training` in its section."""
    section = TrainingSection.model_validate({"learning_rate": 1e-3, **training})
    module = case.method.loss(draft, case.parts, case.options, activation_checkpointing=False)
    sharded = shard(module, ranks, torch.float32)
    return OptimizerStep(
        module,
        sharded,
        draft,
        method=case.method,
        batcher=case.method.batcher(case.options, case.config, seed=SEED),
        ranks=ranks,
        section=section,
        schedule=Schedule(section.learning_rate, 0.0, None),
    )


def window_of(case: Case, told: Sequence[tuple[int, int]]) -> tuple[DraftBatches, dict[str, int]]:
    """Return one rank's window of one micro-batch of samples with these ordinals and lengths, and what is in it."""
    batcher = case.method.batcher(case.options, case.config, seed=SEED)
    samples = [case.sample(*one) for one in told]
    batch = batcher.collate(samples) if samples else None
    live = 0 if batch is None else batcher.trainable_positions(batch)
    counts = {"samples": len(samples), "tokens": sum(map(len, samples))}
    return DraftBatches([batch], live, batcher.normalisers(batch)), counts


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
