"""Which GPUs of a node each role has, where both roles share one.

Without lists a role sees the GPUs of its worker's environment (``CUDA_VISIBLE_DEVICES`` where the worker was started).
The numbers in a list count what the worker sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from disagg_core.errors import BadInput
from disagg_core.run_spec.section import Section

if TYPE_CHECKING:
    from disagg_core.run_spec.document import RunSpec

VISIBLE = "CUDA_VISIBLE_DEVICES"
Devices = tuple[Annotated[int, Field(ge=0)], ...]


class DevicesSection(Section):
    """The GPUs of producer and consumer, by number, of a node that both run on. None: all that the worker sees."""

    rollout: Devices | None = Field(None, min_length=1, description="GPUs of the producer and of the evaluation.")
    train: Devices | None = Field(None, min_length=1, description="GPUs of the consumer; a process has one.")

    @model_validator(mode="after")
    def _each_gpu_has_one_role(self) -> DevicesSection:
        rollout, train = self.rollout or (), self.train or ()
        for name, given in (("rollout", rollout), ("train", train)):
            if len(set(given)) < len(given):
                raise ValueError(f"expected every GPU once in {name}, found {list(given)}")
        if both := sorted(set(rollout) & set(train)):
            raise ValueError(
                f"expected every GPU in one of the two lists, found {both} in both: a target and a trainer on one GPU "
                f"run out of memory. Where the roles have nodes of their own, give no lists, or set {VISIBLE} where "
                "each pool's worker is started"
            )
        return self


def check_devices(spec: RunSpec) -> None:
    """Check that each role has at least as many GPUs listed as it puts to use.

    Raises:
        ValueError: it has not, or it is told to run on the CPU.
    """
    devices, target, training = spec.orchestration.devices, spec.target, spec.training
    if devices.train is not None:
        _expect("train", devices.train, training.device, training.processes, "training.processes")
    if devices.rollout is not None:
        serving = target.backend == "sglang" and not target.server_urls
        wanted = target.servers * target.tensor_parallel if serving else None
        _expect("rollout", devices.rollout, target.device, wanted, "target.servers x target.tensor_parallel")


def _expect(role: str, given: Devices, device: str, wanted: int | None, what: str) -> None:
    if device == "cpu":
        raise ValueError(f"orchestration.devices.{role}: expected no GPUs for a role on the CPU, found {list(given)}")
    if wanted is not None and len(given) < wanted:
        raise ValueError(
            f"orchestration.devices.{role}: expected at least {wanted} GPUs ({what}), found {len(given)}: {list(given)}"
        )


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
