"""Admission: what is admitted, stored and published never exceeds the high watermark, whatever happens in between."""

from __future__ import annotations

import pytest

from disagg_core.contracts import PromptTask
from disagg_core.rollout.pipeline import Pipeline
from disagg_core.rollout.prompt_source import PromptSource
from disagg_core.run.watermarks import Watermarks
from tests.unit.channel.kit import make_ref

pytestmark = pytest.mark.unit


def test_a_reference_that_is_published_while_the_channel_is_asked_still_takes_its_room() -> None:
    """The channel answers as it was before; when the answer arrives, the reservation is gone."""
    tasks = [PromptTask(ordinal=n, source=f"given:{n}", input_ids=[1, 2], loss_mask=[0, 1]) for n in range(8)]
    remote = 0
    publishing = False

    def in_flight() -> tuple[int, int]:
        nonlocal remote
        answer = remote
        if publishing and remote:
            pipeline.stop()  # the second look, which is told of what was published
        elif publishing:
            ready = pipeline.pop_ready(10)
            remote += len(ready)
            pipeline.published([0, 1])
        return answer, 0

    pipeline = Pipeline(
        PromptSource.of_tasks(tasks, group=2),
        Watermarks(window=2, high_refs=4),
        ordered=True,
        in_flight=in_flight,
        sample_bytes=lambda task: 0,
    )
    first, second = pipeline.next_batch("a"), pipeline.next_batch("b")
    assert first is not None
    assert second is not None
    for ordinal, lease in first.leases.items():
        assert pipeline.stored(lease, make_ref(ordinal))
    publishing = True

    assert pipeline.next_batch("a") is None
    assert pipeline.admitted + remote == 4
    pipeline.source.close()
