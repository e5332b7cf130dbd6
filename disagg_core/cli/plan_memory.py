"""The memory that each process of a run takes, as far as its plan says: what `draftline plan` lists.

Estimates to choose a machine by, made from the sizes of things; the allocator's waste is not in them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from disagg_core.drafts.cost import TrainedBytes, part_of_shared, trained_bytes
from disagg_core.drafts.warm_start import first_config
from disagg_core.engines.transformers import decode_budget, group_for
from disagg_core.rollout.worker import QUEUED_BYTES
from disagg_core.run.plan import PlannedDraft, RunPlan
from disagg_core.target.weights import weight_bytes
from disagg_core.training.offload import CHUNK_BYTES

_LIBRARIES = 400 * 1024**2
"""What a process has after importing torch and transformers, on a machine without a GPU."""

_KEPT_STATES = 6
_KEPT_INNER = 3
"""Activations of one layer that live at a time, for each token: so many of the hidden size, so many of the MLP's."""


@dataclass(frozen=True)
class ProcessMemory:
    """One process and what it holds: what it is, and its bytes."""

    process: str
    parts: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(size for _, size in self.parts)


def memory_of(plan: RunPlan) -> list[ProcessMemory]:
    """Return what the processes take that work on samples: producer or server, and each training rank."""
    return [_server(plan) if plan.spec.target.backend == "sglang" else _producer(plan), _trainer(plan)]


def _producer(plan: RunPlan) -> ProcessMemory:
    weights = weight_bytes(plan.spec.target, getattr(torch, plan.target.dtype))
    queued = min(QUEUED_BYTES, plan.watermarks.high_refs * plan.max_sample_bytes)
    return ProcessMemory(
        "producer",
        (
            ("libraries", _LIBRARIES),
            ("target weights", weights),
            ("batch", _batch(plan)),
            ("samples on their way to the store", queued),
            ("transfer buffers", 2 * plan.staging_bytes),
        ),
    )


def _batch(plan: RunPlan) -> int:
    """Return the bytes of the larger of a capture's batch and a decoded one."""
    spec, facts = plan.spec, plan.target
    item = int(getattr(torch, facts.dtype).itemsize)
    activations = (_KEPT_STATES * facts.hidden_size + _KEPT_INNER * facts.intermediate_size) * item
    captured = max(spec.rollout.batch_tokens, spec.data.max_tokens) * (activations + 2 * plan.bytes_per_token)
    if spec.data.generate is None:
        return captured
    rows = group_for(spec.rollout.batch_tokens)
    tokens = max(spec.data.max_tokens, min(decode_budget(spec.rollout.batch_tokens), rows * spec.data.max_tokens))
    cached = 2 * facts.num_layers * facts.num_key_value_heads * facts.head_dim * item
    return max(captured, tokens * (cached + activations) + 2 * rows * facts.vocab_size * item)


def _server(plan: RunPlan) -> ProcessMemory:
    target = plan.spec.target
    weights = weight_bytes(plan.spec.target, getattr(torch, plan.target.dtype)) // target.tensor_parallel
    return ProcessMemory(
        "SGLang server, beside its own pool of keys and values",
        (("target weights on each GPU", weights), ("transfer buffers", 2 * plan.staging_bytes)),
    )


def _trainer(plan: RunPlan) -> ProcessMemory:
    spec, facts = plan.spec, plan.target
    item = int(getattr(torch, facts.dtype).itemsize)
    frozen = facts.vocab_size * facts.hidden_size * item * (1 if facts.tie_word_embeddings else 2)
    return ProcessMemory(
        "each training rank, beside the activations of its batch",
        (
            ("libraries", _LIBRARIES),
            *_trained(plan),
            ("checkpoint on its way to the disk", _staged(plan)),
            ("target's embedding and head", frozen),
            ("samples fetched ahead", spec.training.prefetch_samples * plan.max_sample_bytes),
            ("batches of a step and of the next one", 2 * _window(plan)),
            ("transfer buffers", 2 * plan.staging_bytes),
        ),
    )


def _staged(plan: RunPlan) -> int:
    """Return the bytes of a rank's part of a checkpoint, which is copied to host memory before it is written."""
    found = [_trained_bytes(draft, plan.spec.training.optimizer) for draft in plan.drafts]
    return -(-sum(own.checkpoint for own in found) // plan.spec.world_size)


def _trained(plan: RunPlan) -> list[tuple[str, int]]:
    training, ranks = plan.spec.training, plan.spec.world_size
    found = [_trained_bytes(draft, training.optimizer) for draft in plan.drafts]
    weights = -(-sum(own.weights for own in found) // ranks)
    optimizer = -(-sum(own.optimizer for own in found) // ranks)
    if not training.optimizer_offload:
        return [("drafts, gradients, optimizer", weights + optimizer)]
    visiting = min(optimizer, 2 * CHUNK_BYTES * len(plan.drafts))
    return [("drafts, gradients", weights + visiting), ("optimizer, in host memory", optimizer)]


def _trained_bytes(draft: PlannedDraft, optimizer: str) -> TrainedBytes:
    size = draft.vocabulary.size
    config = first_config(draft.init_path, draft.section, draft.target, draft.capture, size)
    return trained_bytes(draft.method, config, optimizer)


def _window(plan: RunPlan) -> int:
    """Return the bytes of one rank's batches of an optimizer step, of samples of the longest length, for all drafts.

    Of samples that ranks share each has its part.
    """
    spec, facts = plan.spec, plan.target
    samples = spec.training.batch_size * spec.training.accumulation_steps
    by_token = sum(draft.capture.bytes_per_token(facts.hidden_size, facts.dtype) for draft in plan.drafts)
    return part_of_shared(samples * spec.data.max_tokens * by_token, spec.training.context_parallel)
