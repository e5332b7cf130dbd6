"""Child of the test of options beside context parallelism: all ranks share each sample for some steps of a method.

Arguments: the method, a file for losses and one for weights, which rank 0 writes, and options of the training section.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from disagg_core.run_spec.document import TrainingSection
from disagg_core.training.consumer import DraftToTrain, input_of, optimizer_step_of
from disagg_core.training.distributed import Ranks
from disagg_core.training.phase_clock import PhaseClock
from disagg_core.training.state import gather_weights
from tests.contract.drafts.kit import SEED, Case

WINDOWS = ((18, 25, 40), (33,), (12, 9, 60, 21), (18, 25, 40), (100, 7), (33, 20))
"""Lengths of the samples of each step."""


def main(name: str, losses_to: Path, weights_to: Path, options: str) -> None:
    """Run one rank."""
    torch.set_num_threads(1)
    with Ranks.join("cpu") as joined:
        ranks = joined.sharing_context(joined.size)
        changes = {"learning_rate": 1e-3, "warmup_ratio": 0.0, **json.loads(options)}
        section = TrainingSection(processes=ranks.size, context_parallel=ranks.size, **changes)
        case = Case.of(name)
        draft = DraftToTrain(case.draft(), case.options)
        batcher = case.method.batcher(case.options, case.config, seed=SEED)
        step = optimizer_step_of(draft, case.parts, ranks, section, batcher, None, PhaseClock())
        reads = input_of(draft, batcher, section, ranks.context)
        losses = []
        for number, lengths in enumerate(WINDOWS):
            window = reads.begin()
            reads.add(window, [case.sample(10 * number + place, tokens) for place, tokens in enumerate(lengths)])
            queued = step.run(window, number, samples=len(lengths), tokens=sum(lengths))
            assert queued is not None
            losses.append(queued.result().loss)
        weights = gather_weights(draft.model, draft.model.serving_state_dict())
        if ranks.is_first:
            losses_to.write_text(json.dumps(losses))
            save_file(weights, weights_to)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
