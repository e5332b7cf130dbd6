"""Child of `test_consumer`: the consumer's process, whose rank 0 is killed while it settles a window in the background.

Arguments: the role's document, the moment ("trained": before the window is acknowledged, "acknowledged": before its
samples are removed), the window's number, and how many further steps are taken before that moment.
"""

import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from disagg_core.channel import StreamingRefChannel
from disagg_core.processes.retry import wait_until
from disagg_core.roles import consumer
from disagg_core.run.metrics import read_metrics
from disagg_core.run.plan import RoleAssignment
from disagg_core.store import MooncakeFeatureStore


def main(document: str, moment: str, window: int, ahead: int) -> None:
    """Run the role until the moment has come."""
    metrics = RoleAssignment.model_validate_json(Path(document).read_bytes()).plan.dir.metrics / "train.jsonl"

    def killed(real: Callable[..., Any]) -> Callable[..., Any]:
        calls = itertools.count(1)

        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) == window:
                wait_until(lambda: steps(metrics) >= window + ahead, timeout_s=60, every_s=0.005)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    if os.environ.get("RANK", "0") == "0":
        if moment == "trained":
            StreamingRefChannel.ack = killed(StreamingRefChannel.ack)
        else:
            MooncakeFeatureStore.release_many = killed(MooncakeFeatureStore.release_many)
    consumer.main([document])


def steps(metrics: Path) -> int:
    """Return the last step that was taken."""
    return max((int(str(record["step"])) for record in read_metrics(metrics)), default=0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
