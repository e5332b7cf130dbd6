"""Admission: what is admitted, stored and published never exceeds the high watermark, whatever happens in between."""

from __future__ import annotations

import pytest

from disagg_core.contracts import PromptTask
from disagg_core.errors import TargetUnavailable
from disagg_core.rollout.pipeline import FAILURES_IN_ROW, Pipeline
from disagg_core.rollout.prompt_source import PromptSource
from disagg_core.run.attempts import RETRIED
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


def a_pipeline(prompts: int, **options: int) -> Pipeline:
    tasks = [PromptTask(ordinal=n, source=f"given:{n}", input_ids=[1, 2], loss_mask=[0, 1]) for n in range(prompts)]
    return Pipeline(
        PromptSource.of_tasks(tasks, group=1),
        Watermarks(window=2, high_refs=prompts),
        ordered=True,
        in_flight=lambda: (0, 0),
        sample_bytes=lambda task: 0,
        **options,
    )


@pytest.mark.parametrize("retryable", [True, False])
def test_a_target_that_fails_whatever_the_prompt_ends_the_run_with_a_class_that_is_tried_again(retryable: bool) -> None:
    pipeline = a_pipeline(200)
    answered = 0
    while (batch := pipeline.next_batch("a")) is not None:
        for lease in batch.leases.values():
            answered += 1
            if retryable:
                pipeline.failed(lease, "CUDA error", "local")
            else:
                pipeline.rejected(lease, "not finite")
    assert answered == FAILURES_IN_ROW
    assert isinstance(pipeline.error, TargetUnavailable)
    assert pipeline.error.failure_class in RETRIED
    assert pipeline.source.rejected < 200
    pipeline.source.close()


def test_bad_prompts_between_good_ones_and_prompts_of_a_bad_form_end_no_run() -> None:
    pipeline = a_pipeline(300)
    while (batch := pipeline.next_batch("a")) is not None:
        for ordinal, lease in batch.leases.items():
            if ordinal < 100:
                pipeline.rejected(lease, "token id 99 is not of the target", own_form=True)
            elif ordinal % 30:
                pipeline.rejected(lease, "refused")
            else:
                pipeline.available()
                assert pipeline.stored(lease, make_ref(ordinal))
    assert not pipeline.stopping
    pipeline.source.close()
