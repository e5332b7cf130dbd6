"""Child of `test_killed_rank`: joins as the trainer does; rank 1 ends as told, rank 0 says what it makes of it."""

import os
import signal
import sys
import time
from pathlib import Path

from disagg_core.roles.consumer import _outcome_path, _true_cause
from disagg_core.run.outcomes import write_failure
from disagg_core.training.distributed import Ranks


def main() -> None:
    """Run one rank; arguments: directory for the outcomes, how rank 1 ends."""
    state, end = Path(sys.argv[1]), sys.argv[2]
    ranks = Ranks.join("cpu")
    started = time.time()
    ranks.sum([1.0])
    try:
        if ranks.rank == 1:
            if end == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyError("a bug of ours")
        while True:
            ranks.sum([1.0])
    except (RuntimeError, KeyError) as error:
        write_failure(_outcome_path(state, ranks.rank), started, _true_cause(error, state, ranks))
        os._exit(1)


if __name__ == "__main__":
    main()
