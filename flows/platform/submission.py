"""Submitting a training run to the Prefect server in PREFECT_API_URL, and following it."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
from prefect import get_client
from prefect.client.schemas.filters import FlowRunFilterId
from prefect.deployments import arun_deployment

from disagg_core.processes.shutdown import CANCELLATION_S
from disagg_core.run_spec.document import RunSpec
from flows.online_disagg_training import online_disagg_training
from flows.platform.deployments import TRAINING
from tasks.cancellation import cancel_unfinished

DEPLOYMENT = f"{online_disagg_training.name}/{TRAINING}"


@dataclass(frozen=True)
class RunState:
    """The state of a flow run as Prefect knows it."""

    name: str
    message: str
    final: bool
    completed: bool


_PLAIN_HTTP = {"verify": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)}
"""Trusts nobody: to load the usual certificates for each question takes longer than the answer."""

UNREACHABLE = RunState("server away", "", final=False, completed=False)


def submit(spec: RunSpec) -> UUID:
    """Create a run of the parent flow and return its id."""
    return asyncio.run(_submit(spec))


async def _submit(spec: RunSpec) -> UUID:
    run = await arun_deployment(
        DEPLOYMENT,
        parameters={"spec": spec.model_dump(mode="json")},
        timeout=0,
        as_subflow=False,
        tags=["draftline"],
    )
    return run.id


def read_state(flow_run_id: UUID) -> RunState:
    """Return the run's state on the local platform; `UNREACHABLE` while its server does not answer."""
    try:
        return asyncio.run(_read_state(flow_run_id, _PLAIN_HTTP))
    except httpx.TransportError:
        return UNREACHABLE
    except httpx.HTTPStatusError as error:
        if error.response.is_server_error:
            return UNREACHABLE
        raise


async def _read_state(flow_run_id: UUID, connection: dict[str, Any] | None = None) -> RunState:
    async with get_client(httpx_settings=connection) as client:
        state = (await client.read_flow_run(flow_run_id)).state
    if state is None:
        return RunState("Pending", "", final=False, completed=False)
    return RunState(
        state.name or state.type.value, state.message or "", final=state.is_final(), completed=state.is_completed()
    )


def cancel(flow_run_id: UUID, timeout_s: float = CANCELLATION_S) -> None:
    """Cancel a run and wait up to `timeout_s` until it has ended.

    Raises:
        httpx.HTTPError: the server does not answer.
    """
    asyncio.run(_cancel(flow_run_id, timeout_s))


async def _cancel(flow_run_id: UUID, timeout_s: float) -> None:
    async with get_client() as client:
        await cancel_unfinished(client, "interrupted", wait_s=timeout_s, id=FlowRunFilterId(any_=[flow_run_id]))


def state_of(flow_run_id: UUID | str) -> str:
    """Return the name of a run's state.

    Raises:
        httpx.HTTPError: the server does not answer.
    """
    return asyncio.run(_read_state(UUID(str(flow_run_id)))).name
