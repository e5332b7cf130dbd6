"""Mutated channel files: nothing but named errors, no hanging, and no reference that was not published."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from disagg_core.channel import StreamingRefChannel
from disagg_core.channel.file.backend import FileBackend
from disagg_core.channel.file.filesystem import FileSystem
from disagg_core.contracts import SampleRef
from disagg_core.errors import ChannelError
from tests.unit.channel.kit import FakeClock, dead_process, make_refs, totals_of

pytestmark = pytest.mark.unit

COUNT = 20
PUBLISHED = make_refs(COUNT)


class QuickFiles(FileSystem):
    def sync(self, descriptor: int) -> None: ...

    def sync_directory(self, directory: Path) -> None: ...


def open_channel(directory: Path, clock: FakeClock | None = None) -> StreamingRefChannel:
    clock = clock or FakeClock()
    backend = FileBackend(directory, run_id="local", attempt=1, files=QuickFiles(), local=True, clock=clock)
    return StreamingRefChannel(
        directory, backend=backend, idle_timeout_s=50.0, lease_s=0.02, process=dead_process(), clock=clock
    )


def build(directory: Path) -> None:
    """A stream of twenty references by two writers, five of them acknowledged, with its end."""
    for part in (PUBLISHED[:8], PUBLISHED[8:]):
        with open_channel(directory) as writer:
            writer.publish_many(part)
    with open_channel(directory) as reader:
        reader.ack(reader.poll(5), step=1)
    with open_channel(directory) as writer:
        writer.close(totals_of(PUBLISHED))


def flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def overwrite(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    for place in range(start, min(len(data), start + rng.randrange(1, 400))):
        data[place] = rng.randrange(256)


def zero(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.randrange(1, 4096))
    data[start:end] = bytes(end - start)


def delete(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, 3000)]


def insert(data: bytearray, rng: random.Random) -> None:
    place = rng.randrange(len(data))
    data[place:place] = rng.randbytes(rng.randrange(1, 200))


def cut(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def repeat(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[rng.randrange(len(data)) : 0] = data[start : start + rng.randrange(1, 3000)]


def _lines(how: Callable[[list[bytes], random.Random], None]) -> Callable[[bytearray, random.Random], None]:
    def mutate(data: bytearray, rng: random.Random) -> None:
        lines = bytes(data).splitlines(keepends=True)
        how(lines, rng)
        data[:] = b"".join(lines)

    mutate.__name__ = how.__name__
    return mutate


def drop_line(lines: list[bytes], rng: random.Random) -> None:
    del lines[rng.randrange(len(lines))]


def double_line(lines: list[bytes], rng: random.Random) -> None:
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))


def swap_lines(lines: list[bytes], rng: random.Random) -> None:
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]


def edit_digit(lines: list[bytes], rng: random.Random) -> None:
    place = rng.randrange(len(lines))
    digit = bytes([rng.choice(b"0123456789")])
    lines[place] = lines[place].replace(digit, bytes([rng.choice(b"0123456789")]), 1)


MUTATIONS = [flip, overwrite, zero, delete, insert, cut, repeat]
MUTATIONS += [_lines(how) for how in (drop_line, double_line, swap_lines, edit_digit)]


def read_to_the_end(directory: Path) -> tuple[list[SampleRef], str]:
    """Read as a consumer does, with a clock that runs while it waits; return what came and how it ended."""
    clock = FakeClock()
    found: list[SampleRef] = []
    with open_channel(directory, clock) as reader:
        try:
            for _ in range(200):
                refs = reader.poll(3)
                found += refs
                if reader.is_closed() and not refs:
                    return found, "ended"
                if not refs:
                    clock.now += 10.0
        except ChannelError as error:
            return found, type(error).__name__
    raise AssertionError("the reader hangs")


def fuzz(tmp_path: Path, rounds: int, seed: int) -> dict[str, int]:
    build(tmp_path / "intact")
    assert read_to_the_end_of_copy(tmp_path) == (PUBLISHED[5:], "ended")
    outcomes: dict[str, int] = {}
    for number in range(rounds):
        rng = random.Random(seed + number)
        directory = tmp_path / "mutated"
        shutil.copytree(tmp_path / "intact", directory)
        target = rng.choices(
            sorted(directory.iterdir()), [1 if p.suffix == ".json" else 12 for p in sorted(directory.iterdir())]
        )[0]
        data = bytearray(target.read_bytes())
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            if data:
                rng.choice(MUTATIONS)(data, rng)
        target.write_bytes(data)
        found, how = read_to_the_end(directory)
        assert found == PUBLISHED[5 : 5 + len(found)], f"seed {seed + number}: not what was published"
        assert how != "ended" or len(found) == COUNT - 5, f"seed {seed + number}: a short stream taken for a whole one"
        outcomes[how] = outcomes.get(how, 0) + 1
        shutil.rmtree(directory)
    return outcomes


def read_to_the_end_of_copy(tmp_path: Path) -> tuple[list[SampleRef], str]:
    shutil.copytree(tmp_path / "intact", tmp_path / "copy")
    return read_to_the_end(tmp_path / "copy")


def test_mutated_files_give_named_errors_only(tmp_path: Path) -> None:
    outcomes = fuzz(tmp_path, 400, seed=0)
    assert outcomes.get("ChannelDamaged", 0) > 50
    assert outcomes.get("ChannelStalled", 0) > 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_mutated_files_give_named_errors_only(tmp_path: Path) -> None:
    print(fuzz(tmp_path, 10_000, seed=1_000_000))


def fuzz_writer(tmp_path: Path, rounds: int) -> None:
    """The next writer on a mutated log either refuses it by name or leaves a stream that reads as published."""
    for number in range(rounds):
        rng = random.Random(number)
        directory = tmp_path / f"{number}"
        with open_channel(directory) as writer:
            writer.publish_many(PUBLISHED[:6])
        log = directory / "refs.jsonl"
        data = bytearray(log.read_bytes())
        rng.choice(MUTATIONS)(data, rng)
        log.write_bytes(data)
        try:
            with open_channel(directory) as writer:
                kept = list(writer.published_sample_ids())
                rest = [ref for ref in PUBLISHED if ref.sample_id not in kept]
                writer.publish_many(rest)
                writer.close(totals_of(PUBLISHED))
        except ChannelError:
            continue
        assert read_to_the_end(directory) == (PUBLISHED, "ended")


def test_the_next_writer_refuses_or_repairs(tmp_path: Path) -> None:
    fuzz_writer(tmp_path, 150)
