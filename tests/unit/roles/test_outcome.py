"""What a consumer leaves behind is read by its parent, whatever the fit came to."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from disagg_core.roles.consumer import result_of
from disagg_core.run.outcomes import read_outcome, write_outcome
from disagg_core.training.checkpoint import DraftProgress
from disagg_core.training.progress import TrainOutcome

pytestmark = pytest.mark.unit


def test_an_outcome_with_samples_that_were_given_up_is_written_and_read(tmp_path: Path) -> None:
    outcome = TrainOutcome(
        reason="end of stream",
        steps=2,
        samples=6,
        tokens=60,
        quarantined=1,
        quarantined_ordinals=[(4, 4)],
        lost=1,
        skipped=0,
        unused=0,
        steps_here=2,
        samples_here=6,
        tokens_here=60,
        drafts={"": DraftProgress(step=2)},
        parameters={"": 1000},
        seconds=1.0,
        data_wait_s=0.1,
        samples_per_second=6.0,
        tokens_per_second=60.0,
        checkpoint="step-2",
        given_up=[("s000000004", "not finite"), ("s000000007", "no longer in the store")],
    )
    write_outcome(tmp_path / "outcome.json", time.time(), result_of(outcome, {"consumer_gets": 8.0}))
    read = read_outcome(tmp_path / "outcome.json")
    assert read is not None
    assert read.result["quarantined_ordinals"] == [[4, 4]]
    assert read.result["given_up"] == [["s000000004", "not finite"], ["s000000007", "no longer in the store"]]
    assert read.result["store_counters"] == {"consumer_gets": 8.0}
