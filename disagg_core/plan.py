"""The resolved plan of a run: everything that both roles must agree on, derived once from the run document.

Made by `make_plan` before anything is started; written to ``run.json``; handed to the roles as a `RoleAssignment`.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from disagg_core.contracts import RunIdentity
from disagg_core.run_dir import AttemptDir, RunDir
from disagg_core.run_spec import RunSpec
from disagg_core.target_facts import TargetFacts


class StoreEndpoints(BaseModel):
    """Where the feature store of an attempt is reached (host:port each)."""

    model_config = ConfigDict(frozen=True)

    master_address: str
    metrics_address: str


class RunPlan(BaseModel):
    """A run, resolved: spec, facts of the target, identities, counts and watermarks."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    root: Path
    spec: RunSpec
    target: TargetFacts
    tokenizer_version: str
    draft_vocab_size: int
    prompts_per_epoch: int | None
    total_prompts: int | None
    total_steps: int | None
    store_capacity: int
    max_sample_bytes: int
    high_watermark_refs: int
    low_watermark_refs: int
    high_watermark_bytes: int
    low_watermark_bytes: int

    @property
    def dir(self) -> RunDir:
        """The run's directory."""
        return RunDir(self.root)

    def identity(self, attempt: int, vocab_map_version: str) -> RunIdentity:
        """Return the identity that the references of `attempt` carry."""
        return RunIdentity(
            run_id=self.run_id,
            attempt=attempt,
            strategy=self.spec.draft.method,
            target_model_version=self.target.version,
            tokenizer_version=self.tokenizer_version,
            vocab_map_version=vocab_map_version,
            draft_weight_version=0,
            aux_layers=self.target.aux_layers,
            dtype=self.target.dtype,
        )


class RoleAssignment(BaseModel):
    """What one role process is told: the plan, which attempt it is, and where the store is."""

    model_config = ConfigDict(frozen=True)

    plan: RunPlan
    attempt: int
    store: StoreEndpoints

    @property
    def dir(self) -> AttemptDir:
        """The attempt's directory."""
        return self.plan.dir.attempt(self.attempt)

    @property
    def namespace(self) -> str:
        """The prefix of the attempt's keys in the store."""
        return f"{self.plan.run_id}/{self.attempt}"

    @property
    def channel_url(self) -> str:
        """The attempt's reference channel."""
        configured = self.plan.spec.channel.url
        return configured if configured else f"file:{self.dir.channel}"
