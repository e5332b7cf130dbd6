"""The resolved plan of a run: everything that both roles must agree on, derived once from the run document.

`make_plan` derives and checks it before anything is started; it is written to ``run.json`` and handed to the roles as
a `RoleAssignment`.
"""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from disagg_core.contracts import Capture, RunIdentity
from disagg_core.drafts.registry import method_of
from disagg_core.errors import SpecError
from disagg_core.prompts.pinned import PinnedData
from disagg_core.run.directory import AttemptDir, RunDir
from disagg_core.run.watermarks import Watermarks
from disagg_core.run_spec.document import RunSpec
from disagg_core.store.capacity import staging_bytes_for
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.target.facts import TargetFacts

_ALIGNMENT_SLACK = 4 * 64


def run_id_of(spec: RunSpec, flow_run_id: object) -> str:
    """Return the id of the run that the parent flow run `flow_run_id` is."""
    return f"{spec.run.name}-{str(flow_run_id).rsplit('-', 1)[-1]}"


class RunPlan(BaseModel):
    """A run, resolved: spec, facts of the target, identities, counts and watermarks."""

    model_config = ConfigDict(frozen=True)

    run_id: str
    root: Path
    spec: RunSpec
    target: TargetFacts
    capture: Capture
    tokenizer_version: str
    draft_vocab_size: int
    total_prompts: int | None
    total_steps: int | None
    store_capacity: int
    watermarks: Watermarks
    data: PinnedData | None = None
    """What the prompts were when the run was planned; None where that was not looked at."""

    @property
    def dir(self) -> RunDir:
        """The run's directory."""
        return RunDir(self.root)

    @property
    def bytes_per_token(self) -> int:
        """Stored bytes of one token of a sample."""
        return self.capture.bytes_per_token(self.target.hidden_size, self.target.dtype)

    @property
    def max_sample_bytes(self) -> int:
        """The most bytes that one sample takes in the store."""
        return self.watermarks.max_sample_bytes

    @property
    def staging_bytes(self) -> int:
        """The memory that one process takes for transfers in one direction."""
        return staging_bytes_for(self.max_sample_bytes)

    def next_attempt(self) -> int:
        """Return the number of the first attempt that was not begun: 1 unless an earlier process of this run ended."""
        return max(self.dir.begun_attempts(), default=0) + 1

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
            capture=self.capture,
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


def make_plan(
    spec: RunSpec,
    target: TargetFacts,
    *,
    run_id: str,
    root: Path,
    total_prompts: int | None,
    tokenizer_version: str = "",
    data: PinnedData | None = None,
) -> RunPlan:
    """Derive the plan of a run and check its numbers against each other.

    `total_prompts` counts all epochs; None where the prompts cannot be counted beforehand (a streamed dataset).

    Raises:
        BadInput: the draft's options do not fit the target.
        SpecError: context, watermarks or store capacity cannot work together; each number is named.
    """
    method = method_of(spec.draft.method)
    capture = method.capture(spec.draft, target.num_layers, spec.target.aux_layers)
    draft_vocab = method.vocabulary(spec.draft, target).size
    if spec.data.max_tokens > target.max_position_embeddings:
        raise SpecError(
            f"data.max_tokens: expected at most the target's context of {target.max_position_embeddings}, "
            f"found {spec.data.max_tokens}"
        )
    method.check(spec.draft, target, max_tokens=spec.data.max_tokens, draft_tokens=spec.evaluation.draft_tokens)
    bytes_per_token = capture.bytes_per_token(target.hidden_size, target.dtype)
    sample_bytes = spec.data.max_tokens * bytes_per_token + _ALIGNMENT_SLACK
    watermarks = Watermarks.resolve(
        spec.rollout, spec.global_batch_size, max_sample_bytes=sample_bytes, store_capacity=spec.store.capacity
    )
    steps = None if total_prompts is None else math.ceil(total_prompts / spec.global_batch_size)
    if spec.training.max_steps is not None:
        steps = spec.training.max_steps if steps is None else min(steps, spec.training.max_steps)
    return RunPlan(
        run_id=run_id,
        root=root,
        spec=spec,
        target=target,
        capture=capture,
        tokenizer_version=tokenizer_version,
        draft_vocab_size=draft_vocab,
        total_prompts=total_prompts,
        total_steps=steps,
        store_capacity=spec.store.capacity,
        watermarks=watermarks,
        data=data,
    )
