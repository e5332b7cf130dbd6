"""A mount that fails for a moment: the file backend tries again by itself, and opens anew what may be stale."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from disagg_core.channel import StreamingRefChannel
from disagg_core.channel.file.backend import FileBackend
from disagg_core.channel.file.claims import FileClaims
from disagg_core.channel.file.filesystem import FileSystem
from disagg_core.errors import ChannelUnavailable, classify
from tests.unit.channel.kit import ids, make_refs, names, totals_of

pytestmark = pytest.mark.unit

STALE, BROKEN = OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")


def failing(times: int, error: OSError, real: Callable[..., Any]) -> Callable[..., Any]:
    left = [times]

    def call(*arguments: Any, **options: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise error
        return real(*arguments, **options)

    return call


@pytest.mark.parametrize("error", [STALE, BROKEN], ids=["stale", "io"])
@pytest.mark.parametrize(
    ("owner", "method"),
    [(FileClaims, "read_claim"), (FileClaims, "is_newest"), (FileSystem, "replace"), (FileSystem, "sync_directory")],
)
def test_one_error_of_the_mount_is_nobodys_business(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, error: OSError
) -> None:
    with StreamingRefChannel(tmp_path) as writer, StreamingRefChannel(tmp_path) as reader:
        writer.publish_many(make_refs(3))
        refs = reader.poll(2)
        monkeypatch.setattr(owner, method, failing(2, error, getattr(owner, method)))
        reader.ack(refs, step=1)
        monkeypatch.setattr(owner, method, failing(2, error, getattr(owner, method)))
        assert ids(reader.poll(5)) == names(2, 3)
        assert reader.poll(5) == []
        assert reader.writer_status().state == "running"


def test_a_stale_log_is_opened_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server of the mount was replaced: the open descriptor stays stale, the name works."""
    backend = FileBackend(tmp_path, run_id="local", attempt=1, local=True)
    with StreamingRefChannel(tmp_path) as writer, StreamingRefChannel(tmp_path, backend=backend) as reader:
        writer.publish_many(make_refs(2))
        assert ids(reader.poll(1)) == names(1)
        stale, pread, close = backend._reader._descriptor, os.pread, os.close

        def stale_pread(descriptor: int, *arguments: int) -> bytes:
            if descriptor == stale:
                raise STALE
            return pread(descriptor, *arguments)

        def closing(descriptor: int) -> None:
            nonlocal stale
            stale = None if descriptor == stale else stale
            close(descriptor)

        writer.publish_many(make_refs(2, 4))
        monkeypatch.setattr(os, "pread", stale_pread)
        monkeypatch.setattr(os, "close", closing)
        assert ids(reader.poll(5)) == names(1, 4)


def test_a_writer_whose_descriptor_went_stale_goes_on_without_doubling_anything(tmp_path: Path) -> None:
    class Files(FileSystem):
        stale: int | None = None

        def sync(self, descriptor: int) -> None:
            if descriptor == self.stale:
                raise STALE  # what was written has landed all the same
            super().sync(descriptor)

    files = Files()
    backend = FileBackend(tmp_path, run_id="local", attempt=1, files=files, local=True)
    refs = make_refs(5)
    with StreamingRefChannel(tmp_path, backend=backend) as writer, StreamingRefChannel(tmp_path) as reader:
        writer.publish_many(refs[:2])
        files.stale = backend._writing
        with pytest.raises(ChannelUnavailable) as away:
            writer.publish_many(refs[2:4])
        assert classify(away.value) == "infrastructure"
        files.stale = None
        writer.publish_many(refs[2:4])
        writer.publish_many(refs[4:])
        writer.close(totals_of(refs))
        assert ids(reader.stream()) == names(5)


def test_a_mount_that_stays_away_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StreamingRefChannel(tmp_path) as writer, StreamingRefChannel(tmp_path) as reader:
        writer.publish_many(make_refs(3))
        refs = reader.poll(3)
        with monkeypatch.context() as patch:
            patch.setattr(FileSystem, "replace", failing(10**6, BROKEN, FileSystem.replace))
            with pytest.raises(ChannelUnavailable, match="Input/output error"):
                reader.ack(refs, step=1)
        reader.ack(refs, step=1)
        assert writer.in_flight_remote() == 0


@pytest.mark.parametrize("instead", ["nothing", "an empty directory"])
@pytest.mark.parametrize("local", [True, False], ids=["local", "network"])
def test_a_directory_that_is_away_is_waited_for(tmp_path: Path, instead: str, local: bool) -> None:
    """As when its mount is lost: that is no claim that was taken over, and no log that was removed."""
    place, aside = tmp_path / "channel", tmp_path / "aside"
    backend = FileBackend(place, run_id="local", attempt=1, local=local)
    refs = make_refs(8)
    with StreamingRefChannel(place) as writer, StreamingRefChannel(place, backend=backend) as reader:
        writer.publish_many(refs[:4])
        got = reader.poll(3)
        place.rename(aside)
        if instead == "an empty directory":
            place.mkdir()
        for call in (
            lambda: writer.publish_many(refs[4:6]),
            lambda: reader.ack(got, step=1),
            writer.in_flight_remote,
            reader.writer_status,
            lambda: writer._writer._heartbeat.beat(),
        ):
            with pytest.raises(ChannelUnavailable, match="not there any more"):
                call()
        if instead == "an empty directory":
            assert list(place.iterdir()) == []
            place.rmdir()
        aside.rename(place)
        writer._writer._heartbeat.beat()
        writer.publish_many(refs[4:])
        reader.ack(got, step=1)
        assert ids(reader.poll(9)) == names(3, 8)
        assert writer.in_flight_remote() == 5
