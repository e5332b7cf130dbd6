"""The shutdown budget nests, and its outermost part is what Prefect really gives a cancelled flow run."""

from __future__ import annotations

import inspect

import pytest
from prefect.runner import Runner

from disagg_core.processes import shutdown

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("parts", shutdown.NESTED)
def test_what_ends_inside_ends_before_what_is_around_it_is_killed(parts: str) -> None:
    outer_s, inner_s = shutdown.NESTED[parts]

    assert outer_s >= inner_s + shutdown.MARGIN_S


def test_a_flow_run_has_the_time_that_prefect_gives_it() -> None:
    grace = inspect.signature(Runner._kill_process).parameters["grace_seconds"].default

    assert grace == shutdown.FLOW_RUN_S
