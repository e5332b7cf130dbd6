"""A producer that works is not stalled: what its target does counts as progress before anything is published."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from disagg_core.channel import StreamingRefChannel
from disagg_core.engines.contract import ServerHealth
from disagg_core.errors import ChannelStalled
from disagg_core.processes.intake import STEP_BYTES, IntakeNotes, noted
from disagg_core.rollout.work import QUIET_S, WorkNotes

pytestmark = pytest.mark.unit


class Working:
    """A target of which only the counts are asked."""

    def __init__(self) -> None:
        self.server = ServerHealth("local")

    def health(self) -> list[ServerHealth]:
        return [self.server]


def test_decoding_steps_captures_and_answers_are_progress_and_idling_is_not() -> None:
    target, told = Working(), []
    notes = WorkNotes(target, told.append)
    notes.look()
    assert told == []
    target.server.worked += 1
    notes.look()
    target.server.captured += 1
    notes.look()
    notes.look()
    assert len(told) == 2


def test_a_target_may_be_silent_over_one_batch_but_not_for_ever() -> None:
    times, told = iter((1.0, 1.0, QUIET_S - 1, QUIET_S - 1, QUIET_S + 1, QUIET_S + 100)), []
    notes = WorkNotes(Working(), told.append, busy_since=lambda: 0.0, clock=lambda: next(times))
    for _ in range(4):
        notes.look()
    assert len(told) == 2


def test_a_model_that_comes_in_is_progress_and_a_mount_that_hangs_is_not() -> None:
    taken, told = iter((100, 100, 100 + STEP_BYTES // 2, 100 + STEP_BYTES, 101 + STEP_BYTES)), []
    notes = IntakeNotes("loading the target", told.append, taken=lambda: next(taken))
    for _ in range(4):
        notes.look()
    assert told == ["loading the target: 0.03 GiB taken in"]


def test_pages_of_mapped_weights_count_as_taken_in(tmp_path: Path) -> None:
    torch.save(torch.zeros(2 * STEP_BYTES // 4), tmp_path / "weights")
    told: list[str] = []
    notes = IntakeNotes("loading the target", told.append)
    notes.look()
    mapped = torch.load(tmp_path / "weights", mmap=True)
    assert told == []
    (mapped + 1).sum()
    notes.look()
    assert len(told) == 1


@pytest.mark.parametrize("works", [True, False])
def test_a_consumer_waits_for_a_target_that_decodes_and_gives_up_one_that_does_nothing(
    tmp_path: Path, works: bool
) -> None:
    """The idle timeout is a sixth of the time that the first reference takes."""
    target = Working()
    writer = StreamingRefChannel(tmp_path, lease_s=0.3)
    reader = StreamingRefChannel(tmp_path, idle_timeout_s=0.5)
    writer.claim_writer()
    stop = threading.Event()

    def decode() -> None:
        while works and not stop.wait(0.02):
            target.server.worked += 1

    decoding = threading.Thread(target=decode)
    decoding.start()
    stalled = False
    try:
        with noted(WorkNotes(target, writer.note_progress), every_s=0.05):
            deadline = time.monotonic() + 3.0
            while time.monotonic() < deadline and not stalled:
                try:
                    reader.poll(8)
                except ChannelStalled:
                    stalled = True
                reader.wait(0.05)
    finally:
        stop.set()
        decoding.join()
        reader.disconnect()
        writer.disconnect()
    assert stalled is not works
