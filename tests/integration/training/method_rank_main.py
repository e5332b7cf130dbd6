"""Child of the tests of draft methods under several ranks: two steps on one rank's share; rank 0 saves the weights."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

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
        draft, section = case.draft(), TrainingSection(learning_rate=1e-3)
        batcher = case.method.batcher(case.options, case.config, seed=SEED)
        module = case.method.loss(draft, case.parts, case.options, activation_checkpointing=False)
        sharded = shard(module, ranks, torch.float32)
        step = OptimizerStep(
            module,
            sharded,
            draft,
            method=case.method,
            batcher=batcher,
            ranks=ranks,
            section=section,
            schedule=Schedule(section.learning_rate, 0.0, None),
        )
        for number, window in enumerate(WINDOWS):
            mine = [case.sample(*told) for told in window[ranks.rank :: ranks.size]]
            batch = batcher.collate(mine) if mine else None
            live = 0 if batch is None else batcher.trainable_positions(batch)
            sums = batcher.normalisers(batch)
            counts = {"samples": len(mine), "tokens": sum(map(len, mine))}
            assert step.run(DraftBatches([batch], live, sums), number, **counts) is not None
        weights = gather_weights(draft, draft.serving_state_dict())
        if ranks.is_first:
            save_file(weights, folder / f"{ranks.size}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
