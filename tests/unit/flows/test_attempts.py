"""Around an attempt: what fails there is a failed attempt, and the pause before the next can be cancelled."""

from __future__ import annotations

import asyncio
import errno
import logging
from pathlib import Path

import pytest

from disagg_core.errors import StoreUnavailable
from disagg_core.run.attempts import AttemptLoop, AttemptOutcome
from disagg_core.run.plan import RunPlan, make_plan
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.target.facts import read_target_facts
from tasks import attempts
from tasks.mooncake import FeatureStoreServices

pytestmark = pytest.mark.unit

SPEC = Path(__file__).resolve().parents[3] / "infra" / "runs" / "qwen3-8b-eagle3.yaml"
EXTERNAL = ("store.mode=external", "store.master_address=h:1", "store.metrics_address=h:2")


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "get_run_logger", lambda: logging.getLogger("test"))


@pytest.fixture
def plan(tmp_path: Path) -> RunPlan:
    spec = load_spec(SPEC, list(EXTERNAL))
    return make_plan(spec, read_target_facts(spec.target), run_id="run", root=tmp_path, total_prompts=100)


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
        _, still = await asyncio.wait({waiting}, timeout=0.05)
        assert still
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(story())
