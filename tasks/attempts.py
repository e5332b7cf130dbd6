"""One attempt of a run, from the store that it needs to how it ended, and the wait before the next one."""

from __future__ import annotations

import asyncio

import httpx
from prefect.logging import get_run_logger

from disagg_core.errors import DraftlineError, classify
from disagg_core.run.attempts import RETRIED, AttemptLoop, AttemptOutcome
from disagg_core.run.plan import RoleAssignment, RunPlan
from tasks.mooncake import FeatureStoreServices, ready_store
from tasks.roles import Role, RoleRun, run_roles


async def pause_before_next(attempts: AttemptLoop) -> None:
    """Wait as long as the last attempt's failure asks for; cancelling the run ends the wait."""
    if attempts.pause_s:
        last = attempts.outcomes[-1]
        get_run_logger().warning("the next attempt begins in %g s, after %s", attempts.pause_s, last.describe())
        await asyncio.sleep(attempts.pause_s)


async def run_attempt(
    plan: RunPlan, attempt: int, store: FeatureStoreServices
) -> tuple[AttemptOutcome, dict[Role, RoleRun]]:
    """Run one attempt on a store that is ready for it; say how it ended, and its roles if they began.

    A store, a mount or a Prefect server that fails around the roles is an attempt that failed, as in a role.

    Raises:
        DraftlineError, OSError, httpx.HTTPError: a failure that another attempt would only meet again.
    """
    try:
        endpoints = await ready_store(store, attempt)
        assignment = RoleAssignment(plan=plan, attempt=attempt, store=endpoints)
        return await run_roles(assignment, store.require_alive)
    except (DraftlineError, OSError, httpx.HTTPError) as error:
        failure_class = classify(error)
        if failure_class == "bug" or failure_class not in RETRIED:
            raise
        return AttemptOutcome(attempt, failure_class, f"{type(error).__name__}: {error}"), {}
