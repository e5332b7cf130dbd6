"""Where the nodes of a multi-node consumer meet: node 0 says on which host and port, the others wait for that.

The rendezvous is torchrun's static one: only there is the node that leaves the outcome also the one with rank 0.
"""

from __future__ import annotations

import json
import os

from disagg_core.errors import RoleFailed
from disagg_core.files import write_atomically
from disagg_core.processes.retry import wait_until
from disagg_core.processes.tree import free_port
from disagg_core.run.plan import RoleAssignment
from disagg_core.settings import get_settings

_POLL_S = 0.5


def meet(assignment: RoleAssignment, node_rank: int, nodes: int) -> list[str]:
    """Return torchrun's rendezvous arguments of this node; node 0 is reached at its DRAFTLINE_HOST.

    Raises:
        RoleFailed: node 0 did not say where it is within the stall timeout.
    """
    place = assignment.dir.state / "rendezvous.json"
    if node_rank == 0:
        host = get_settings().host
        write_atomically(place, json.dumps({"endpoint": f"{host}:{free_port(host)}", "pid": os.getpid()}))
    timeout_s = assignment.plan.spec.orchestration.stall_timeout_s
    if not wait_until(place.is_file, timeout_s=timeout_s, every_s=_POLL_S):
        raise RoleFailed(
            f"node 0 of the consumer did not start within {timeout_s:g} s (orchestration.stall_timeout_s); expected "
            f"its address in {place}",
            "stalled",
        )
    return [
        f"--nnodes={nodes}",
        f"--node-rank={node_rank}",
        "--rdzv-backend=static",
        f"--rdzv-endpoint={json.loads(place.read_bytes())['endpoint']}",
        f"--rdzv-id={assignment.plan.run_id}-{assignment.attempt}",  # names a log folder: no slash
    ]
