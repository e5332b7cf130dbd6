"""Child of the tests of what ranks wait for: rank 0's checkpoint, and a stop that only rank 1 was asked for."""

import sys
import threading
import time
from functools import partial
from pathlib import Path

from disagg_core.channel import StreamingRefChannel
from disagg_core.errors import RoleFailed
from disagg_core.processes.retry import wait_until
from disagg_core.run.outcomes import exit_with
from disagg_core.training.checkpoint import newest_complete, saving
from disagg_core.training.distributed import Ranks
from tests.integration.training.consumer_kit import consumer


def save(ranks: Ranks, folder: Path) -> None:
    """Save a checkpoint that rank 0 takes its time to write; rank 1 notes what it finds when it may go on."""
    complete = saving._complete

    def slowly(*args):
        wait_until((folder / "rank 1 went on").exists, timeout_s=3.0, every_s=0.05)
        complete(*args)

    saving._complete = slowly
    with StreamingRefChannel(f"file:{folder}/channel", run_id="r") as channel:
        trainer, _ = consumer(channel if ranks.is_first else None, None, ranks, checkpoints=folder / "checkpoints")
        trainer.save()
        if not ranks.is_first:
            found = newest_complete(folder / "checkpoints")
            (folder / "rank 1 went on").write_text(f"complete: {found is not None}")


def fail(ranks: Ranks, folder: Path) -> None:
    """Have rank 0 fail to write; each rank notes what it sees of that."""

    def broken(*args):
        raise MemoryError("no room")

    saving._complete = broken
    with StreamingRefChannel(f"file:{folder}/channel", run_id="r") as channel:
        trainer, _ = consumer(channel if ranks.is_first else None, None, ranks, checkpoints=folder / "checkpoints")
        try:
            trainer.save()
        except (MemoryError, RoleFailed) as error:
            failure_class = getattr(error, "failure_class", "")
            (folder / f"rank {ranks.rank}").write_text(f"{type(error).__name__} {failure_class} {error}")


def stop(ranks: Ranks, folder: Path, *, unsettled: bool = False) -> None:
    """Wait for a stream without samples; only rank 1 is asked to stop, and notes how long that took.

    With `unsettled`, rank 0's disk does not answer before that.
    """
    asked: list[float] = []
    answers = threading.Event()
    with StreamingRefChannel(f"file:{folder}/channel", run_id="r") as channel:
        _, loader = consumer(channel if ranks.is_first else None, None, ranks)

        def ask() -> None:
            asked.append(time.monotonic())
            loader.request_stop()

        if not ranks.is_first:
            threading.Timer(1.5, ask).start()
        elif unsettled:
            loader._settling.settle(lambda: answers.wait(30), [])
        assert list(loader) == []
        answers.set()
        assert loader.end_reason == "stop requested"
        if not ranks.is_first:
            (folder / "seconds").write_text(str(time.monotonic() - asked[0]))


def main() -> None:
    with Ranks.join("cpu") as these:
        stop_unsettled = partial(stop, unsettled=True)
        act = {"save": save, "fail": fail, "stop": stop, "stop unsettled": stop_unsettled}[sys.argv[1]]
        act(these, Path(sys.argv[2]))


if __name__ == "__main__":
    exit_with(main)
