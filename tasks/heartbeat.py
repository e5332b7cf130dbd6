"""How often a flow run says that it lives, and how long it may say nothing until it counts as dead.

Prefect's own default is a heartbeat every 180 s. Ours travels with every deployment (`HEARTBEAT_ENVIRONMENT` is part
of its job variables), so that a run beats at our rate on any worker. ``infra/prefect.yaml`` says the same.

Nothing here imports Prefect: `flows.platform.local` needs it before Prefect's settings are read.
"""

from __future__ import annotations

from disagg_core.errors import BadInput

HEARTBEAT_S = 30
"""Seconds between two heartbeats of a flow run; Prefect accepts no fewer."""

HEARTBEAT_WINDOW_S = 240
"""Seconds of silence after which a flow run counts as dead.

A Prefect server that is away for two minutes must not cost a healthy run: up to one heartbeat before it went, 120 s,
about a minute in which it starts and the runs connect again, and one heartbeat more.
"""

HEARTBEAT_SETTING = "PREFECT_FLOWS_HEARTBEAT_FREQUENCY"
HEARTBEAT_ENVIRONMENT = {HEARTBEAT_SETTING: str(HEARTBEAT_S)}
"""What sets the rate in the process of a flow run."""

_SLOWEST_S = HEARTBEAT_WINDOW_S // 3


class HeartbeatTooRare(BadInput):
    """The process of a run sends its heartbeats so rarely that a healthy run would be taken for dead."""


def check_heartbeat(frequency_s: int | None) -> None:
    """Check that `frequency_s`, Prefect's ``flows.heartbeat_frequency``, puts three heartbeats into the window.

    Raises:
        HeartbeatTooRare: it does not, or heartbeats are switched off (None).
    """
    if frequency_s is not None and frequency_s <= _SLOWEST_S:
        return
    found = "none at all" if frequency_s is None else f"one every {frequency_s} s"
    raise HeartbeatTooRare(
        f"{HEARTBEAT_SETTING}: expected a heartbeat of this flow run at least every {_SLOWEST_S} s, found {found}: "
        f"after {HEARTBEAT_WINDOW_S} s without one the run is set to Crashed. Register the deployments again "
        f"(draftline register, or prefect deploy --all with infra/prefect.yaml), or set "
        f"{HEARTBEAT_SETTING}={HEARTBEAT_S} where the flow run is started"
    )
