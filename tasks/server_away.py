"""A Prefect server that is away for a while: what is asked of it is asked again until it is back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httpx
from prefect import get_client
from prefect.settings import PREFECT_API_URL

from disagg_core.processes.retry import Retry

T = TypeVar("T")

_POLL_S = 1.0
_SERVER_AWAY_S = 180.0
"""A restart with an upgrade takes two minutes; an answer that never comes is given up by Prefect's client after one."""


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """Await `call()`, which may be sent twice; ride out a server that is away for up to `_SERVER_AWAY_S`."""
    clock = asyncio.get_running_loop().time
    return await Retry(is_away, budget_s=_SERVER_AWAY_S, every_s=_POLL_S, clock=clock).of(call)


def wait_for_server() -> None:
    """Wait until the server answers, at most `_SERVER_AWAY_S`, where there is one.

    For the end of a flow: one that cannot be told how it ended takes the run for dead, minutes later, and all that it
    did is done again.
    """
    if not PREFECT_API_URL.value():
        return
    asking = Retry(is_away, budget_s=_SERVER_AWAY_S, every_s=_POLL_S, what="the Prefect server")
    with contextlib.suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        asking(client.hello)


def is_away(error: BaseException) -> bool:
    """Tell whether `error` is that of a server that does not answer at present, and not its answer."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)
