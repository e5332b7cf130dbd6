"""Between attempts: an external store that is away is waited for; what fails around the roles is a failed attempt."""

from __future__ import annotations

import asyncio
import errno
import logging
from pathlib import Path

import pytest

from disagg_core.errors import BadInput, StoreTooLarge, StoreUnavailable
from disagg_core.run.attempts import AttemptLoop, AttemptOutcome
from disagg_core.run.plan import RunPlan, make_plan
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.target.facts import read_target_facts
from tasks import attempts, mooncake
from tasks.mooncake import FeatureStoreServices

pytestmark = pytest.mark.unit

SPEC = Path(__file__).resolve().parents[3] / "infra" / "runs" / "qwen3-8b-eagle3.yaml"
EXTERNAL = ("store.mode=external", "store.master_address=h:1", "store.metrics_address=h:2")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (mooncake, attempts):
        monkeypatch.setattr(module, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(mooncake, "_AWAY_PAUSE_S", 0.001)

    async def nothing_left(*_: object) -> int:
        return 0

    monkeypatch.setattr(mooncake, "sweep", nothing_left)


@pytest.fixture
def plan(tmp_path: Path) -> RunPlan:
    spec = load_spec(SPEC, list(EXTERNAL))
    return make_plan(spec, read_target_facts(spec.target), run_id="run", root=tmp_path, total_prompts=100)


def answers(monkeypatch: pytest.MonkeyPatch, *script: Exception | None) -> None:
    left = list(script)

    def probe(endpoints: StoreEndpoints, _capacity: int) -> None:
        if left and (error := left.pop(0)) is not None:
            raise error

    monkeypatch.setattr(mooncake, "probe_store", probe)


def test_an_external_store_that_restarts_between_attempts_is_waited_for(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    away, small = StoreUnavailable("refused"), StoreTooLarge("an owner still takes its memory")
    answers(monkeypatch, None, away, away, away, small, small)
    store = FeatureStoreServices(plan)
    assert asyncio.run(store.ready(1)).master_address == "h:1"
    assert asyncio.run(store.ready(2)).master_address == "h:1"


def test_an_external_store_that_was_never_large_enough_is_bad_input_at_once(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch, StoreTooLarge("2 bytes"))
    with pytest.raises(BadInput, match="2 bytes"):
        asyncio.run(FeatureStoreServices(plan).ready(1))


@pytest.mark.parametrize(
    ("error", "expected"),
    [(StoreUnavailable("gone"), "store_lost"), (OSError(errno.EIO, "Input/output error"), "infrastructure")],
)
def test_what_fails_around_the_roles_is_a_failed_attempt(
    plan: RunPlan, monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    async def fails(*_: object) -> StoreEndpoints:
        raise error

    monkeypatch.setattr(attempts, "ready_store", fails)
    outcome, roles = asyncio.run(attempts.run_attempt(plan, 1, FeatureStoreServices(plan)))
    assert (outcome.failure_class, roles) == (expected, {})


def test_the_wait_before_an_attempt_can_be_cancelled() -> None:
    loop = AttemptLoop(limit=3)
    loop.record(AttemptOutcome(1, "infrastructure", "away"))

    async def story() -> None:
        waiting = asyncio.create_task(attempts.pause_before_next(loop))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(story())
