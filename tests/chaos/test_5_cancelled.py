"""A run is cancelled from the UI in each of its phases, and goes on when it is tried again."""

from __future__ import annotations

import pytest

from tests.chaos.conftest import Start
from tests.chaos.kit import ChaosRun

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(1800)]


def test_while_the_store_starts(start: Start) -> None:
    run = start("cancelled while the store starts")
    run.cancel_in(lambda: run.find("owner"), "the store starts", run.parent)
    goes_on_after_retry(run)


def test_while_the_model_is_loaded(start: Start) -> None:
    run = start("cancelled while the target is loaded")
    run.cancel_in(lambda: run.find("producer"), "the target is loaded", lambda: run.process("producer"))
    goes_on_after_retry(run)


def test_while_it_captures_and_trains(start: Start) -> None:
    run = start("cancelled while it captures and trains")
    run.train_until(step=6)
    run.cancel_in(lambda: True, "capture", lambda: run.process("producer"))
    goes_on_after_retry(run)


def test_while_a_checkpoint_is_saved(start: Start) -> None:
    run = start("cancelled while a checkpoint is saved")
    run.train_until(step=6)
    run.cancel_in(
        lambda: any(run.dir.checkpoints.glob(".step-*.tmp")), "a checkpoint is saved", lambda: run.process("consumer")
    )
    goes_on_after_retry(run)


def test_while_the_archive_is_written(start: Start) -> None:
    run = start("cancelled while the archive is written")
    run.train_until(step=6)
    run.cancel_in(run.dir.completion.is_file, "the archive is written", run.parent)
    goes_on_after_retry(run, attempts=())


def test_while_the_draft_is_evaluated(start: Start) -> None:
    run = start("cancelled while the draft is evaluated", "evaluation.prompts=8", "evaluation.max_new_tokens=64")
    run.train_until(step=6)
    run.cancel_in(lambda: run.find("evaluation"), "evaluation", lambda: run.process("evaluation"))
    goes_on_after_retry(run, attempts=())


def goes_on_after_retry(run: ChaosRun, attempts: tuple[str, ...] = ("finished",)) -> None:
    run.is_cancelled()
    run.retry()
    run.completes(attempts)
