"""Where the nodes of a multi-node consumer meet: node 0 says on which host and port, the others wait for that.

The rendezvous is torchrun's static one: only there is the node that leaves the outcome also the one with rank 0.
"""

from __future__ import annotations

import json
import os
import time

from disagg_core.errors import RoleFailed
from disagg_core.files import write_atomically
from disagg_core.processes.tree import free_port
from disagg_core.run.plan import RoleAssignment
from disagg_core.settings import get_settings


def meet(assignment: RoleAssignment, node_rank: int, nodes: int) -> list[str]:
    """Return torchrun's rendezvous arguments of this node; node 0 is reached at its DRAFTLINE_HOST.

    Raises:
        RoleFailed: node 0 did not say where it is within the stall timeout.
    """
    place = assignment.dir.state / "rendezvous.json"
    if node_rank == 0:
        host = get_settings().host
        write_atomically(place, json.dumps({"endpoint": f"{host}:{free_port(host)}", "pid": os.getpid()}))
    deadline = time.monotonic() + assignment.plan.spec.orchestration.stall_timeout_s
    while not place.is_file():
        if time.monotonic() > deadline:
            raise RoleFailed(f"node 0 of the consumer did not start; expected its address in {place}", "stalled")
        time.sleep(0.5)
    return [
        f"--nnodes={nodes}",
        f"--node-rank={node_rank}",
        "--rdzv-backend=static",
        f"--rdzv-endpoint={json.loads(place.read_bytes())['endpoint']}",
        f"--rdzv-id={assignment.plan.run_id}-{assignment.attempt}",  # names a log folder: no slash
    ]
