"""The shutdown budget nests, and its outermost part is what Prefect really gives a cancelled flow run."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
from prefect.runner import Runner

from disagg_core.processes import shutdown
from flows.train_consumer import launcher

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("parts", shutdown.NESTED)
def test_what_ends_inside_ends_before_what_is_around_it_is_killed(parts: str) -> None:
    outer_s, inner_s = shutdown.NESTED[parts]

    assert outer_s >= inner_s + shutdown.MARGIN_S


def test_torchrun_kills_its_ranks_before_it_is_killed_itself() -> None:
    """It leaves them 30 s otherwise, and they have sessions of their own."""
    training = SimpleNamespace(processes=2, nodes=1)
    plan = SimpleNamespace(spec=SimpleNamespace(training=training))
    assignment = SimpleNamespace(plan=plan, dir=SimpleNamespace(logs="logs"))

    options = dict(option.split("=") for option in launcher(assignment, 0) if "=" in option)

    assert float(options["--shutdown-timeout"]) == shutdown.RANKS_S < shutdown.ROLE_S


def test_a_flow_run_has_the_time_that_prefect_gives_it() -> None:
    grace = inspect.signature(Runner._kill_process).parameters["grace_seconds"].default

    assert grace == shutdown.FLOW_RUN_S
