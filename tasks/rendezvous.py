"""Where the nodes of a multi-node consumer meet: node 0 says on which host and port, the others wait for that.

The rendezvous is torchrun's static one: only there is the node that leaves the outcome also the one with rank 0.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
from collections.abc import Mapping

import psutil

from disagg_core.errors import BadInput, RoleFailed
from disagg_core.files import write_atomically
from disagg_core.processes.retry import wait_until
from disagg_core.processes.tree import free_port, host_port
from disagg_core.run.plan import RoleAssignment
from disagg_core.settings import get_settings

_POLL_S = 0.5
_IP = (socket.AF_INET, socket.AF_INET6)
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def meet(assignment: RoleAssignment, node_rank: int, nodes: int) -> list[str]:
    """Return torchrun's rendezvous arguments of this node; node 0 is reached at its DRAFTLINE_HOST.

    Raises:
        RoleFailed: node 0 did not say where it is within the stall timeout.
    """
    place = assignment.dir.state / "rendezvous.json"
    host = get_settings().host
    if node_rank == 0:
        write_atomically(place, json.dumps({"endpoint": host_port(host, free_port(host)), "pid": os.getpid()}))
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


def address_for_others(host: str) -> str:
    """Return the address of `host`, this node's DRAFTLINE_HOST, at which other nodes reach it.

    Raises:
        BadInput: it is loopback or no single address, or cannot be resolved.
    """
    try:
        address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise BadInput(
            f"DRAFTLINE_HOST: {host} cannot be resolved ({error}); set it to an address of this node"
        ) from error
    found = ipaddress.ip_address(address.partition("%")[0])
    if found.is_loopback or found.is_unspecified:
        raise BadInput(
            f"DRAFTLINE_HOST: training.nodes above 1 needs an address at which the other nodes reach this one, found "
            f"{host}; set it to one on every node of the training pool"
        )
    return address


def network_environment(host: str, nodes: int, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what to add to a node's `environment` so that gloo and NCCL speak where `host` (DRAFTLINE_HOST) is.

    By themselves they take the address of the host name, which often is loopback, or the first interface that is up.
    Nothing for one node, and nothing that is set already.

    Raises:
        BadInput: no interface of this machine has that address, or other nodes cannot reach it.
    """
    if nodes == 1:
        return {}
    address = address_for_others(host)
    interfaces = psutil.net_if_addrs()
    for name, addresses in interfaces.items():
        if any(own.address.partition("%")[0] == address.partition("%")[0] for own in addresses):
            return {variable: name for variable in _INTERFACES if variable not in environment}
    found = ", ".join(own.address for addresses in interfaces.values() for own in addresses if own.family in _IP)
    raise BadInput(f"DRAFTLINE_HOST: expected an address of this node, which has {found}, found {host} ({address})")
