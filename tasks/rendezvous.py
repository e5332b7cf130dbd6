"""Where the nodes of a multi-node consumer meet: node 0 says on which host and port, the others wait for that."""

from __future__ import annotations

import json
import os
import socket
import time

from disagg_core.errors import RoleFailed
from disagg_core.plan import RoleAssignment
from disagg_core.processes import free_port
from disagg_core.run_dir import write_atomically


def meet(assignment: RoleAssignment, node_rank: int, nodes: int) -> list[str]:
    """Return torchrun's rendezvous arguments of this node.

    Raises:
        RoleFailed: node 0 did not say where it is within the stall timeout.
    """
    place = assignment.dir.state / "rendezvous.json"
    if node_rank == 0:
        host = socket.getfqdn()
        write_atomically(place, json.dumps({"endpoint": f"{host}:{free_port('')}", "pid": os.getpid()}))
    deadline = time.monotonic() + assignment.plan.spec.orchestration.stall_timeout_s
    while not place.is_file():
        if time.monotonic() > deadline:
            raise RoleFailed(f"node 0 of the consumer did not start; expected its address in {place}", "stalled")
        time.sleep(0.5)
    return [
        f"--nnodes={nodes}",
        f"--node-rank={node_rank}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={json.loads(place.read_bytes())['endpoint']}",
        f"--rdzv-id={assignment.namespace}",
    ]
