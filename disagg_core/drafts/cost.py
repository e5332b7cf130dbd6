"""What one draft costs in a run, known from configs alone: parameters, bytes, rows of logits, memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from disagg_core.contracts import DTYPE_BYTES, Capture
from disagg_core.drafts.matrices import hidden_matrices
from disagg_core.drafts.method import DraftConfig, DraftMethod
from disagg_core.run_spec.document import TrainingSection
from disagg_core.run_spec.draft import DraftSection
from disagg_core.target.facts import TargetFacts

_NUMBER_BYTES = 4
"""Of fp32, in which masters, gradients, the optimizer's state and logits are."""


@dataclass(frozen=True)
class TrainedBytes:
    """What training keeps of a draft's parameters, over all ranks together."""

    masters: int
    """The weights in fp32: all that a checkpoint holds before the first step."""
    optimizer: int
    """AdamW's two moments of a parameter; Muon's one of a matrix."""

    @property
    def weights(self) -> int:
        """Masters and their gradients."""
        return 2 * self.masters

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.optimizer

    @property
    def checkpoint(self) -> int:
        """What a checkpoint holds of it."""
        return self.masters + self.optimizer


def trained_bytes(method: DraftMethod, config: DraftConfig, optimizer: str) -> TrainedBytes:
    """Return what a draft of `config` takes in training by `optimizer`, as ``training.optimizer`` names it."""
    parameters, moments = method.parameters(config), 2 * method.parameters(config)
    if optimizer == "muon":
        with torch.device("meta"):
            moments -= sum(matrix.numel() for matrix in hidden_matrices(method.model(config)))
    return TrainedBytes(parameters * _NUMBER_BYTES, moments * _NUMBER_BYTES)


def part_of_shared(size: int, shared_by: int) -> int:
    """Return the most bytes of a batch of `size` that each of the ranks has which share it.

    Its states are those of two parts: of the positions that the rank computes, and of those whose keys it makes.
    """
    return min(size, -(-2 * size // shared_by))


@dataclass(frozen=True)
class DraftCost:
    """What training one draft takes.

    `bytes_per_token` is what the store holds of a sample. Rows of logits are counted for a sample of the longest
    length; `logits_bytes` is what they would take in fp32 if a step held them at once, which no method does.
    """

    parameters: int
    bytes_per_token: int
    logit_rows: int
    logit_width: int
    max_tokens: int
    frozen_bytes: int
    """The target's embedding and LM head, whole on every rank."""
    trained: TrainedBytes
    offloaded: bool
    """Whether the optimizer's state is in host memory."""

    @property
    def logits_bytes(self) -> int:
        """The logits of one sample in fp32."""
        return self.logit_rows * self.logit_width * _NUMBER_BYTES

    def rank_bytes(self, world_size: int, batch_size: int, shared_by: int = 1) -> int:
        """Return what each of `world_size` ranks holds, with captured states of a micro-batch, without activations.

        `shared_by` ranks share each micro-batch. What of the optimizer is in host memory is not in it.
        """
        states = part_of_shared(batch_size * self.max_tokens * self.bytes_per_token, shared_by)
        trained = self.trained.weights if self.offloaded else self.trained.total
        return -(-trained // world_size) + self.frozen_bytes + states


def cost_of(
    method: DraftMethod,
    options: DraftSection,
    config: DraftConfig,
    facts: TargetFacts,
    capture: Capture,
    *,
    max_tokens: int,
    compute_dtype: str,
    training: TrainingSection,
) -> DraftCost:
    """Return what a draft of `config` costs; `compute_dtype` is torch's name of the dtype of the target's parts."""
    matrices = 1 if facts.tie_word_embeddings else 2
    return DraftCost(
        parameters=method.parameters(config),
        bytes_per_token=capture.bytes_per_token(facts.hidden_size, facts.dtype),
        logit_rows=method.logit_rows(options, config, max_tokens),
        logit_width=config.draft_vocab_size,
        max_tokens=max_tokens,
        frozen_bytes=matrices * facts.vocab_size * facts.hidden_size * DTYPE_BYTES[compute_dtype],
        trained=trained_bytes(method, config, training.optimizer),
        offloaded=training.optimizer_offload,
    )
