"""How long either side waits for a channel that is away before its run fails: the same on both."""

from __future__ import annotations

from collections.abc import Callable

from disagg_core.errors import ChannelUnavailable
from disagg_core.processes.retry import Retry

CHANNEL_AWAY_S = 60.0
"""A channel may be away for so long, whatever was wanted of it, beyond its backend's own retries."""

CHANNEL_PAUSE_S = 0.25


def patience(on_wait: Callable[[], None]) -> Retry:
    """Return what calls again while the channel is away; `on_wait` raises what is to end that sooner."""
    return Retry(
        ChannelUnavailable, budget_s=CHANNEL_AWAY_S, every_s=CHANNEL_PAUSE_S, what="the channel", on_wait=on_wait
    )
