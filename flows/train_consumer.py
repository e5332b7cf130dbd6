"""The consumer: trains the draft from the stream of captured samples. Pool ``gpu-train``, one run for each node."""

from __future__ import annotations

import os
import sys

from prefect import flow

from disagg_core.processes.shutdown import RANKS_S
from disagg_core.run.devices import visible_devices
from disagg_core.run.plan import RoleAssignment
from disagg_core.settings import get_settings
from tasks.rendezvous import meet, network_environment
from tasks.role_process import run_role_process, write_assignment


@flow(name="train-consumer")
def train_consumer(assignment: RoleAssignment, node_rank: int = 0) -> None:
    """Run one node of the training consumer of one attempt: a ``torchrun`` tree, or one plain process."""
    role = "consumer" if node_rank == 0 else f"consumer-node{node_rank}"
    spec = assignment.plan.spec
    environment = {
        **visible_devices(spec, "train", os.environ),
        **network_environment(get_settings().host, spec.training.nodes, os.environ),
    }
    document = write_assignment(assignment, role)
    run_role_process(
        role,
        [sys.executable, *launcher(assignment, node_rank), "-m", "disagg_core.roles.consumer", str(document)],
        assignment,
        assignment.dir.logs / f"{role}.log",
        environment=environment,
        leaves_outcome=node_rank == 0,
    )


def launcher(assignment: RoleAssignment, node_rank: int) -> list[str]:
    """Return the arguments that put the role under ``torchrun``; none for a single process, which needs no agent."""
    training = assignment.plan.spec.training
    if training.processes * training.nodes == 1:
        return []
    where = ["--standalone"] if training.nodes == 1 else meet(assignment, node_rank, training.nodes)
    return [
        "-m",
        "torch.distributed.run",
        *where,
        f"--nproc-per-node={training.processes}",
        f"--log-dir={assignment.dir.logs}",
        "--redirects=3",
        f"--shutdown-timeout={RANKS_S:.0f}",
    ]
