"""The producer: the frozen target captures hidden states of prompts into the feature store. Pool ``gpu-rollout``."""

from __future__ import annotations

import os
import sys

from prefect import flow

from disagg_core.run.devices import visible_devices
from disagg_core.run.plan import RoleAssignment
from tasks.role_process import run_role_process, write_assignment


@flow(name="rollout-producer")
def rollout_producer(assignment: RoleAssignment) -> None:
    """Run the rollout producer of one attempt until the stream has its end."""
    document = write_assignment(assignment, "producer")
    run_role_process(
        "producer",
        [sys.executable, "-m", "disagg_core.roles.producer", str(document)],
        assignment,
        assignment.dir.logs / "producer.log",
        environment=visible_devices(assignment.plan.spec, "rollout", os.environ),
    )
