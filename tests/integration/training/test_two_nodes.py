"""A consumer on two nodes: torchrun and gloo meet over the link between two network namespaces."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.integration.two_hosts import HOSTS, started

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(240)]


def test_the_ranks_of_two_nodes_find_each_other_where_draftline_host_says(
    two_hosts: dict[str, str], tmp_path: Path
) -> None:
    """The host names of the nodes resolve to nothing, or to loopback, as on most machines."""
    with ExitStack() as cleanup:
        nodes = [
            started(
                cleanup,
                space,
                [sys.executable, "-m", "tests.integration.training.node_main", "node", str(tmp_path), str(node_rank)],
                tmp_path / f"node-{node_rank}.log",
                {"DRAFTLINE_HOST": HOSTS[side], "OMP_NUM_THREADS": "1"},
            )
            for node_rank, (side, space) in enumerate(two_hosts.items())
        ]
        for node_rank, node in enumerate(nodes):
            assert node.wait(180) == 0, (tmp_path / f"node-{node_rank}.log").read_text()[-4000:]

    for number in (0, 1):
        assert json.loads((tmp_path / f"rank-{number}.json").read_text()) == [2, 3.0, "link0"]
