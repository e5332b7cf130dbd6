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
from disagg_core.run.directory import AttemptDir, RunDir
from disagg_core.run_spec.document import RunSpec
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.target.facts import TargetFacts

_ALIGNMENT_SLACK = 4 * 64
_STORE_SHARE = 0.8


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
    max_sample_bytes: int
    high_watermark_refs: int
    low_watermark_refs: int
    high_watermark_bytes: int
    low_watermark_bytes: int

    @property
    def dir(self) -> RunDir:
        """The run's directory."""
        return RunDir(self.root)

    @property
    def bytes_per_token(self) -> int:
        """Stored bytes of one token of a sample."""
        return self.capture.bytes_per_token(self.target.hidden_size, self.target.dtype)

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
    high_bytes = spec.rollout.high_watermark_bytes or int(spec.store.capacity * _STORE_SHARE)
    low_bytes = spec.rollout.low_watermark_bytes or max(high_bytes // 2, spec.quantum * sample_bytes)
    high_refs = spec.rollout.high_watermark_refs
    low_refs = spec.rollout.low_watermark_refs or max(high_refs // 2, spec.quantum)
    _check_watermarks(spec, high_refs, low_refs, high_bytes, low_bytes, sample_bytes)
    steps = None if total_prompts is None else math.ceil(total_prompts / spec.quantum)
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
        max_sample_bytes=sample_bytes,
        high_watermark_refs=high_refs,
        low_watermark_refs=low_refs,
        high_watermark_bytes=high_bytes,
        low_watermark_bytes=low_bytes,
    )


def _check_watermarks(
    spec: RunSpec, high_refs: int, low_refs: int, high_bytes: int, low_bytes: int, sample_bytes: int
) -> None:
    """Refuse flow control under which the roles would wait for each other for ever, or that overruns the store."""
    window = spec.quantum
    shape = (
        f"{window} samples (training processes x nodes x batch_size x accumulation_steps = "
        f"{spec.training.processes} x {spec.training.nodes} x {spec.training.batch_size} x "
        f"{spec.training.accumulation_steps})"
    )
    for name, refs in (("high_watermark_refs", high_refs), ("low_watermark_refs", low_refs)):
        if refs < window:
            raise SpecError(
                f"rollout.{name}: expected at least one optimizer window of {shape}, found {refs}: "
                "producer and trainer would wait for each other for ever"
            )
    needed = window * sample_bytes
    if spec.store.capacity < needed:
        raise SpecError(
            f"store.capacity: expected at least {needed} bytes, one optimizer window of {shape} of up to "
            f"{sample_bytes} bytes each, found {spec.store.capacity}"
        )
    for name, size in (("high_watermark_bytes", high_bytes), ("low_watermark_bytes", low_bytes)):
        if size < needed:
            raise SpecError(
                f"rollout.{name}: expected at least {needed} bytes, one optimizer window of {shape} of up to "
                f"{sample_bytes} bytes each, found {size}; raise it or store.capacity, or lower data.max_tokens"
            )
    if low_refs > high_refs or low_bytes > high_bytes:
        raise SpecError(
            f"rollout: expected low watermarks at or below the high ones, found refs {low_refs} > {high_refs} "
            f"or bytes {low_bytes} > {high_bytes}"
        )
    if high_bytes > spec.store.capacity:
        raise SpecError(
            f"rollout.high_watermark_bytes: expected at most store.capacity ({spec.store.capacity}), found {high_bytes}"
        )
