"""The consumer's wait for the vocabulary map: it takes nothing from the stream, whatever the mount says of the file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from disagg_core.channel import StreamingRefChannel, StreamingRefQueue
from disagg_core.drafts.vocab import VocabMap
from disagg_core.errors import ProducerFailed, RoleFailed
from disagg_core.processes.stop_signal import StopSignal
from disagg_core.roles import consumer
from tests.unit.channel.kit import ids, make_refs, names, totals_of

pytestmark = pytest.mark.unit


class SlowToShow(type(Path())):
    """A file that a network mount has not heard of for the first looks."""

    looks_missed = 0

    def is_file(self) -> bool:
        if SlowToShow.looks_missed > 0:
            SlowToShow.looks_missed -= 1
            return False
        return super().is_file()


@pytest.fixture
def assignment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.setattr(consumer, "POLL_S", 0.01)
    VocabMap.identity(8).save(tmp_path / "vocab_map.safetensors")
    spec = SimpleNamespace(orchestration=SimpleNamespace(stall_timeout_s=0.5))
    return SimpleNamespace(plan=SimpleNamespace(spec=spec))


def wait_for_map(assignment: SimpleNamespace, folder: Path, reader: StreamingRefChannel) -> None:
    path = SlowToShow(folder / "vocab_map.safetensors")
    consumer._wait_for_vocab_map(assignment, path, reader, None, StopSignal("consumer"))


@pytest.mark.parametrize("looks_missed", [0, 1, 2, 5])
def test_a_short_stream_that_ended_before_the_map_shows_is_delivered_whole(
    tmp_path: Path, assignment: SimpleNamespace, looks_missed: int
) -> None:
    with StreamingRefChannel(tmp_path / "channel") as writer:
        writer.publish_many(make_refs(3))
        writer.close(totals_of(make_refs(3)))
    SlowToShow.looks_missed = looks_missed
    with StreamingRefChannel(tmp_path / "channel") as reader:
        wait_for_map(assignment, tmp_path, reader)
        refs = StreamingRefQueue(reader).get(10, timeout=60)
        assert ids(refs) == names(3)
        reader.ack(refs, step=1)
        assert reader.in_flight_remote() == 0


def test_a_producer_that_ended_without_a_map_or_failed_is_not_waited_for_for_ever(
    tmp_path: Path, assignment: SimpleNamespace
) -> None:
    with StreamingRefChannel(tmp_path / "ended") as writer:
        writer.close(totals_of([]))
    with StreamingRefChannel(tmp_path / "failed") as writer:
        writer.fail("no such model", "bad_input")
    SlowToShow.looks_missed = 10**6
    with StreamingRefChannel(tmp_path / "ended") as reader, pytest.raises(RoleFailed, match="is not there"):
        wait_for_map(assignment, tmp_path, reader)
    with StreamingRefChannel(tmp_path / "failed") as reader, pytest.raises(ProducerFailed, match="no such model"):
        wait_for_map(assignment, tmp_path, reader)
