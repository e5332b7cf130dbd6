"""What one draft costs in a run, known from configs alone: parameters, bytes, rows of logits, memory."""

from __future__ import annotations

from dataclasses import dataclass

from disagg_core.contracts import DTYPE_BYTES, Capture
from disagg_core.drafts.method import DraftConfig, DraftMethod
from disagg_core.run_spec.draft import DraftSection
from disagg_core.target.facts import TargetFacts

TRAINED_BYTES = 4 * 4
"""Of a parameter: its fp32 master, its gradient and AdamW's two moments."""
_LOGIT_BYTES = 4


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

    @property
    def trained_bytes(self) -> int:
        """Weights, gradients and optimizer state, over all ranks together."""
        return self.parameters * TRAINED_BYTES

    @property
    def logits_bytes(self) -> int:
        """The logits of one sample in fp32."""
        return self.logit_rows * self.logit_width * _LOGIT_BYTES

    def rank_bytes(self, world_size: int, batch_size: int) -> int:
        """Return what each of `world_size` ranks holds, with captured states of a micro-batch, without activations."""
        states = batch_size * self.max_tokens * self.bytes_per_token
        return -(-self.trained_bytes // world_size) + self.frozen_bytes + states


def cost_of(
    method: DraftMethod,
    options: DraftSection,
    config: DraftConfig,
    facts: TargetFacts,
    capture: Capture,
    *,
    max_tokens: int,
    compute_dtype: str,
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
    )
