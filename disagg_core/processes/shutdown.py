"""How long each part of a run has to end, from the outermost to the innermost: one budget, checked as one.

When a flow run is cancelled, Prefect's worker sends SIGTERM and kills `FLOW_RUN_S` later. Inside that time the role's
process tree has `ROLE_S` to save its state, inside that a producer ends its drive and then its servers, and the pool
waits for each of its servers. What ends inside must end before what is around it is killed, by `MARGIN_S` at least.
"""

from __future__ import annotations

MARGIN_S = 2.0
"""Time for what each part does besides waiting for the part inside it."""

CANCELLATION_S = 60.0
"""How long whoever cancels a flow run waits for its end before it is given up."""

PLATFORM_S = 40.0
"""How long the local platform waits for the flow runs that it cancels, before it stops the workers under them."""

FLOW_RUN_S = 30.0
"""From SIGTERM to SIGKILL of a flow run's process. Prefect's own, not ours to choose."""

ROLE_S = 25.0
"""From SIGTERM to SIGKILL of a role's process tree: a checkpoint is saved, a stream is ended."""

RANKS_S = 22.0
"""From SIGTERM to SIGKILL of the ranks of a consumer, by torchrun, which ends after them."""

CHILDREN_S = 20.0
"""How long a cancelled parent waits for the flow runs that it dispatched."""

DRIVE_S = 10.0
"""How long a failed or stopped producer waits for its threads; the stream is ended after it."""

POOL_S = 8.0
"""How long closing the server pool takes at most; it comes after the drive has ended."""

STORE_SERVICE_S = 5.0
"""From SIGTERM to SIGKILL of a store's master or owner, which the parent ends after its children."""

SERVER_S = 3.0
"""From SIGTERM to SIGKILL of an SGLang server."""

NESTED = {
    "a cancellation and its flow run": (CANCELLATION_S, FLOW_RUN_S),
    "the platform and a flow run": (PLATFORM_S, FLOW_RUN_S),
    "a flow run and its role": (FLOW_RUN_S, ROLE_S),
    "a role and its ranks": (ROLE_S, RANKS_S),
    "a role, its drive and its pool": (ROLE_S, DRIVE_S + POOL_S),
    "a drive and the pool that it waits for": (DRIVE_S, POOL_S),
    "the pool and its servers": (POOL_S, SERVER_S),
    "a parent, its children and a store that hangs": (FLOW_RUN_S, CHILDREN_S + STORE_SERVICE_S),
}
"""The time of a part, and the time of what has to end within it."""

_BROKEN = [parts for parts, (outer_s, inner_s) in NESTED.items() if outer_s < inner_s + MARGIN_S]
assert not _BROKEN, f"the shutdown budget leaves less than {MARGIN_S:g} s between: {', '.join(_BROKEN)}"
