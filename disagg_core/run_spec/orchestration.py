"""How a run is orchestrated: work pools, and which GPUs each role has."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from disagg_core.run_spec.section import Section

Devices = tuple[Annotated[int, Field(ge=0)], ...]


class PoolsSection(Section):
    """Prefect work pools."""

    orchestrator: str = Field("orchestrator", description="Pool of the parent flow.")
    rollout: str = Field("gpu-rollout", description="Pool of the producer.")
    train: str = Field("gpu-train", description="Pool of the consumer.")


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
                "run out of memory. Where the roles have nodes of their own, give no lists, or set "
                "CUDA_VISIBLE_DEVICES where each pool's worker is started"
            )
        return self


class OrchestrationSection(Section):
    """How Prefect runs the two roles."""

    pools: PoolsSection = Field(default_factory=PoolsSection, description="Work pools.")
    devices: DevicesSection = Field(default_factory=DevicesSection, description="GPUs by role, on one node.")
    tags: tuple[str, ...] = Field((), description="Further tags on the role runs.")
    stall_timeout_s: float = Field(900.0, gt=0, description="A role that does not start or progress: stalled.")
    producer_restarts: int = Field(2, ge=0, description="Restarts of the producer within an attempt.")
