"""Two ranks, one of which is gone: what the other makes of the broken connection."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagg_core.run.attempts import AttemptLoop
from disagg_core.run.outcomes import read_outcome
from tasks.roles import judge
from tests.integration.forks import end, forked_ranks
from tests.unit.flows.test_decisions import role_run

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(("how", "expected"), [("killed", "infrastructure"), ("raised", "bug")])
def test_a_rank_that_is_gone_without_a_note_is_infrastructure_and_the_run_goes_on(
    tmp_path: Path, how: str, expected: str
) -> None:
    ranks = forked_ranks("tests.integration.roles.killed_rank", [str(tmp_path), how], [tmp_path / "log"] * 2)
    for process in ranks:
        process.join(120)
    for process in ranks:
        end(process)
    outcome = read_outcome(tmp_path / "consumer-outcome.json")
    assert outcome is not None
    assert outcome.failure_class == expected, outcome.message
    loop = AttemptLoop(limit=3)
    loop.record(judge(1, role_run("producer", "Cancelled"), role_run("consumer", "Failed", outcome)))
    assert loop.next() == 2
