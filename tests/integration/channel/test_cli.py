"""``draftline channel inspect``: what is said about good, damaged and missing channels, and with which exit status."""

import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from disagg_core.channel import StreamingRefChannel, inspect_channel
from disagg_core.cli.channel import app
from disagg_core.errors import BadInput
from tests.integration.channel.conftest import Place
from tests.unit.channel.kit import make_refs, totals_of

pytestmark = pytest.mark.integration

run = CliRunner().invoke


def test_a_channel_in_use_is_described_and_left_alone(place: Place) -> None:
    writer, reader = place.open(run_id="night", attempt=3), place.open(run_id="night", attempt=3)
    refs = make_refs(10, run_id="night", attempt=3)
    writer.publish_many(refs)
    reader.ack(reader.poll(4), step=7)

    result = run(app, ["inspect", place.url])
    assert result.exit_code == 0, result.output
    for text in (
        "night, attempt 3",
        "10 references",
        "4 references",
        "step 7",
        "lag       6",
        "is running",
        "end       none",
    ):
        assert text in result.output
    assert "damage    none" in result.output

    reader.ack(reader.poll(6), step=8)
    writer.close(totals_of(refs))
    assert reader.poll(1) == []
    reader.finish("all read")
    found = inspect_channel(place.url)
    assert (found.writer.state, found.reader.state, found.lag_refs, found.damage) == ("ended", "done", 0, None)
    assert found.finished


def test_following_ends_when_both_sides_have(place: Place) -> None:
    writer, reader = place.open(), place.open()
    writer.publish_many(make_refs(2))

    def finish() -> None:
        writer.close(totals_of(make_refs(2)))
        reader.ack(list(reader.stream()))
        reader.finish("all read")

    timer = threading.Timer(0.3, finish)
    timer.start()
    result = run(app, ["inspect", "--follow", place.url])
    timer.join()
    assert result.exit_code == 0
    assert "done (all read)" in result.output


def test_damage_is_shown_with_its_place_and_status_1(tmp_path: Path) -> None:
    with StreamingRefChannel(tmp_path) as writer:
        writer.publish_many(make_refs(4))
    log = tmp_path / "refs.jsonl"
    log.write_bytes(log.read_bytes().replace(b"s000000002", b"s000000009", 1))
    result = run(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert "is damaged at offset" in result.output
    assert "of them 2 references" in result.output


def test_a_torn_tail_is_shown(tmp_path: Path) -> None:
    with StreamingRefChannel(tmp_path) as writer:
        writer.publish_many(make_refs(4))
    with (tmp_path / "refs.jsonl").open("ab") as file:
        file.write(b'{"crc":"00')
    assert inspect_channel(tmp_path).unfinished_bytes == 10
    assert "tail      10 bytes" in run(app, ["inspect", str(tmp_path)]).output


@pytest.mark.parametrize("url", ["ftp://host/x", "redis://", "/nowhere/at/all", "file://host/x"])
def test_an_address_without_a_channel_is_one_line_and_status_2(url: str) -> None:
    result = run(app, ["inspect", url])
    assert result.exit_code == 2
    assert len(result.output.strip().splitlines()) == 1


def test_a_server_with_several_channels_asks_which(redis_port: int) -> None:
    for attempt in (1, 2):
        with StreamingRefChannel(f"redis://127.0.0.1:{redis_port}/9", run_id="several", attempt=attempt) as channel:
            channel.publish_many(make_refs(1, run_id="several", attempt=attempt))
    with pytest.raises(BadInput, match=r"2 channels; add \?channel=<name>: several/1, several/2"):
        inspect_channel(f"redis://127.0.0.1:{redis_port}/9")
    found = inspect_channel(f"redis://127.0.0.1:{redis_port}/9?channel=several/2")
    assert (found.run_id, found.attempt, found.tally.refs) == ("several", 2, 1)


def test_a_server_that_does_not_answer_is_one_line_and_status_1() -> None:
    result = run(app, ["inspect", "redis://127.0.0.1:1/0?channel=x"])
    assert result.exit_code == 1
    assert len(result.output.strip().splitlines()) == 1
