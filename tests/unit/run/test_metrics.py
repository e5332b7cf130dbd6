"""Metric files outlive torn lines, full disks and dead hosts; and nothing else depends on them."""

import logging
from pathlib import Path

import pytest

from disagg_core.run.metrics import JsonlMetrics, read_metrics
from disagg_core.run.progress import ProgressFile, read_progress
from tests.unit.core.test_files import largest_file

pytestmark = pytest.mark.unit


def steps(path: Path) -> list[object]:
    return [record["step"] for record in read_metrics(path)]


@pytest.mark.parametrize("cut", [1, 2, 20, 50])
def test_the_next_attempt_goes_on_behind_a_torn_line(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "train.jsonl"
    with JsonlMetrics(path) as metrics:
        for step in (1, 2, 3):
            metrics.write(step=step, loss=1 / step)
    path.write_bytes(path.read_bytes()[:-cut])
    with JsonlMetrics(path) as metrics:
        for step in (3, 4):
            metrics.write(step=step, loss=1 / step)
    assert steps(path)[-2:] == [3, 4]
    assert all(isinstance(step, int) for step in steps(path))


@pytest.mark.parametrize(
    "line", [b'{"step": 1, "lo{"step": 2}', bytes(4096), b"7", b'{"step": "\xff\xfe"}', b"", b"\xff"]
)
def test_a_damaged_line_is_passed_over_and_counted_once(
    tmp_path: Path, line: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n' + line + b'\n{"step": 3}\n{"st')
    with caplog.at_level(logging.WARNING):
        assert steps(path) == [1, 2, 3]
    (said,) = caplog.messages
    assert "train.jsonl: passed over 2 lines" in said


def test_a_full_disk_costs_records_and_not_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "train.jsonl"
    with JsonlMetrics(path) as metrics, caplog.at_level(logging.WARNING):
        metrics.write(step=1)
        with largest_file(path.stat().st_size + 10):
            metrics.write(step=2)
            metrics.write(step=3)
        metrics.write(step=4)
    assert steps(path) == [1, 4]
    assert len(caplog.messages) == 1


def test_progress_that_cannot_be_written_is_written_the_next_time(tmp_path: Path) -> None:
    progress = ProgressFile(tmp_path / "consumer.json", interval_s=0.0)
    progress.update(step=1)
    with largest_file(5):
        progress.update(step=2)
    assert read_progress(tmp_path / "consumer.json")["step"] == 1
    progress.update(step=3)
    assert read_progress(tmp_path / "consumer.json")["step"] == 3
