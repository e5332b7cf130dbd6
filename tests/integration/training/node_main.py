"""Child of the test of two nodes: one node of a consumer, started as its flow run starts it, with a rank that sums."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from disagg_core.settings import get_settings
from disagg_core.training.distributed import Ranks
from flows.train_consumer import launcher
from tasks.rendezvous import network_environment


def node(folder: Path, node_rank: int) -> int:
    """Run torchrun with the consumer's arguments and network on this node."""
    spec = SimpleNamespace(
        training=SimpleNamespace(processes=1, nodes=2), orchestration=SimpleNamespace(stall_timeout_s=60.0)
    )
    assignment = SimpleNamespace(
        plan=SimpleNamespace(spec=spec, run_id="run"),
        attempt=1,
        dir=SimpleNamespace(state=folder, logs=folder / "logs"),
    )
    environment = {**os.environ, **network_environment(get_settings().host, 2, os.environ)}
    options = launcher(assignment, node_rank)
    return subprocess.run(
        [sys.executable, *options, "-m", "tests.integration.training.node_main", "rank", str(folder)],
        env=environment,
        check=False,
    ).returncode


def rank(folder: Path) -> None:
    """Sum over the ranks of both nodes, over the group of the weights and over that of the messages."""
    with Ranks.join("cpu") as ranks:
        total = ranks.sum([1.0 + ranks.rank])[0]
        (folder / f"rank-{ranks.rank}.json").write_text(
            json.dumps([ranks.size, total, os.environ["GLOO_SOCKET_IFNAME"]])
        )


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank(Path(sys.argv[2]))
    else:
        sys.exit(node(Path(sys.argv[2]), int(sys.argv[3])))
