"""Which GPUs of a node each role sees, where both roles share one.

Without lists a role sees the GPUs of its worker's environment (``CUDA_VISIBLE_DEVICES`` where the worker was started).
The numbers in a list count what the worker sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from disagg_core.errors import BadInput
from disagg_core.run_spec.document import RunSpec

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_devices(spec: RunSpec, role: Literal["rollout", "train"], environment: Mapping[str, str]) -> dict[str, str]:
    """Return what to add to a role's `environment`, its worker's, so that it sees its own GPUs and no others.

    Raises:
        BadInput: the worker does not see so many.
    """
    listed = getattr(spec.orchestration.devices, role)
    if listed is None:
        return {}
    names = environment[VISIBLE].split(",") if environment.get(VISIBLE) else None
    if names is None:
        return {VISIBLE: ",".join(map(str, listed))}
    if max(listed) >= len(names):
        raise BadInput(
            f"orchestration.devices.{role}: expected GPUs that the worker sees, found {list(listed)} with "
            f"{VISIBLE}={environment[VISIBLE]}, which are {len(names)}: the numbers count those, from 0"
        )
    return {VISIBLE: ",".join(names[number].strip() for number in listed)}


def check_shared_node(spec: RunSpec, count: int) -> None:
    """Check that a run whose roles are all on this machine, which has `count` GPUs, uses none of them twice.

    A transformers target and a trainer may share a GPU; a server fills the one that it has.

    Raises:
        BadInput: it would, or a listed GPU is not there.
    """
    devices, target = spec.orchestration.devices, spec.target
    listed = (devices.rollout or ()) + (devices.train or ())
    if missing := [number for number in listed if number >= count]:
        raise BadInput(f"orchestration.devices: expected GPUs of this machine, which has {count}, found {missing}")
    serving = target.backend == "sglang" and not target.server_urls and target.device != "cpu"
    if count and serving and spec.training.device != "cpu" and (devices.rollout is None or devices.train is None):
        first = target.servers * target.tensor_parallel
        raise BadInput(
            "orchestration.devices: the SGLang servers and the trainer would both begin with GPU 0 of this machine; "
            f"say which are whose, as in rollout: {list(range(first))}, "
            f"train: {list(range(first, first + spec.training.processes))}"
        )
