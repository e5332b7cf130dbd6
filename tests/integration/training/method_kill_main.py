"""Child of the tests of killed draft methods: four steps with a checkpoint after each, going on from the newest one.

Arguments: the method, the checkpoints' directory, and the step in whose middle the process kills itself, or -1.
"""

import os
import signal
import sys
from pathlib import Path

import torch

from disagg_core.drafts.tensor_files import CHECKPOINT_WEIGHTS
from disagg_core.training.checkpoint import (
    CheckpointContent,
    DataCursor,
    DraftContent,
    DraftProgress,
    TrainerState,
    load_into,
    newest_complete,
    read_state,
    save_checkpoint,
)
from disagg_core.training.checkpoint.document import OPTIMIZER_FILE
from disagg_core.training.distributed import Ranks
from disagg_core.training.state import optimizer_tensors, prepared_optimizer_tensors
from tests.contract.drafts.kit import Case
from tests.integration.training.method_rank_main import step_of, window_of

STEPS = 4


def main(name: str, root: Path, killed_at: int) -> None:
    torch.set_num_threads(1)
    with Ranks.join("cpu") as ranks:
        case = Case.of(name)
        draft = case.draft()
        step = step_of(case, draft, ranks)
        number = 0
        if (newest := newest_complete(root)) is not None:
            load_into(newest, CHECKPOINT_WEIGHTS, draft.serving_state_dict(), "weights")
            load_into(newest, OPTIMIZER_FILE, prepared_optimizer_tensors(draft, step.optimizer), "optimizer")
            number = read_state(newest).step
            torch.manual_seed(1000 + number)  # no step may depend on it
        while number < STEPS:
            if number == killed_at:
                step.optimizer.register_step_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            batches, counts = window_of(case, [(2 * number, 18 + number), (2 * number + 1, 25)])
            assert step.run(batches, number, **counts) is not None
            number += 1
            save_checkpoint(root, content_of(case, draft, step, number), keep=1)


def content_of(case, draft, step, number: int) -> CheckpointContent:
    state = TrainerState(
        step=number,
        samples=2 * number,
        tokens=0,
        seed=0,
        total_steps=STEPS,
        identity={},
        cursor=DataCursor(),
        drafts={"": DraftProgress(step=number)},
    )
    saved = DraftContent(
        weights=draft.serving_state_dict(),
        config=case.config.to_dict(),
        optimizer=optimizer_tensors(draft, step.optimizer),
        rng={"cpu": torch.get_rng_state()},
    )
    return CheckpointContent(drafts={"": saved}, state=state)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
