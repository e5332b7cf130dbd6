"""The order of the tests for parallel workers: what shares a costly service begins the share of one worker.

pytest-xdist's ``worksteal`` deals the tests out in equal parts, as they are collected; who is done takes from the end
of another one's part. So each part begins with one group of neighbours, which share a Prefect server, a process that
ranks are forked from, or another service, and ends with tests that need none: those change hands, and hardly a service
is started twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUPS = (
    ("tests/integration/flows", "tests/unit/flows/test_heartbeat.py"),
    ("tests/integration/training", "tests/integration/test_acceptance.py", "tests/unit/training"),
    ("tests/e2e", "tests/integration/registry", "tests/integration/tracking", "tests/unit/registry"),
    ("tests/integration/roles", "tests/integration/channel", "tests/integration/rollout", "tests/integration/store"),
)
"""What the parts begin with, in the order in which a worker runs it; about as long, each of them."""


def dealt_out(items: Sequence[pytest.Item], workers: int) -> list[pytest.Item]:
    """Return the tests in an order whose `workers` equal parts begin with a group each."""
    groups: list[list[pytest.Item]] = [[] for _ in GROUPS]
    light: list[pytest.Item] = []
    for item in sorted(items, key=_place_in_group):
        group, _ = _place_in_group(item)
        (groups[group] if group < len(GROUPS) else light).append(item)
    order: list[pytest.Item] = []
    for worker in range(workers):
        order += chain.from_iterable(groups[worker::workers])
        room = max(0, len(items) * (worker + 1) // workers - len(order))
        order += light[:room]
        del light[:room]
    return order + light


def _place_in_group(item: pytest.Item) -> tuple[int, int]:
    """Return the number of the test's group and its place there; behind the last group if it is in none."""
    path = item.path.relative_to(ROOT)
    for group, prefixes in enumerate(GROUPS):
        for place, prefix in enumerate(prefixes):
            if path.is_relative_to(prefix):
                return group, place
    return len(GROUPS), 0
