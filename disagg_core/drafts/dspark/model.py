"""The DSpark draft: DFlash's blocks, whose logits get a bias by the tokens before, and a confidence for each slot.

The Markov head turns what is known before a slot into a vector of rank r; the bias is its product with one matrix
``[V, r]``. With e the embedding of the token before and h the slot's state that vector is

- vanilla: ``e``;
- gated: ``sigmoid(gate_proj [h; e]) * e``;
- rnn: ``tanh(o)``, with ``(g, c, o) = joint_proj [state; e; h]`` and the next
  ``state = sigmoid(g) state + (1 - sigmoid(g)) tanh(c)``, 0 before a block.

In training the token before is the sample's, so that all slots are computed at once (the rnn slot by slot); in decoding
it is the one just drafted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from disagg_core.drafts.dflash.model import DFlashDraft
from disagg_core.drafts.dspark.config import DSparkConfig
from disagg_core.drafts.linear import Linear, linear


class MarkovHead(nn.Module):
    """The embedding ``[V, r]`` of the token before, the bias's matrix ``[V, r]``, and what one head has between."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        rank, hidden = config.markov_rank, config.hidden_size
        self.kind = config.markov_head_type
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        self.markov_w2 = Linear(rank, config.vocab_size)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)
        elif self.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    def start(self, hidden: Tensor) -> Tensor:
        """Return the state ``[..., r]`` before a block with slots ``[..., K, H]``."""
        return hidden.new_zeros(*hidden.shape[:-2], self.markov_w1.embedding_dim)

    def step(self, embedded: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bias's vector and the next state, both ``[..., r]``.

        Args:
            embedded: the token before, ``[..., r]``.
            hidden: the slot's state, ``[..., H]``.
            state: after the slot before, ``[..., r]``; only the rnn has one.
        """
        if self.kind == "vanilla":
            return embedded, state
        if self.kind == "gated":
            return self.gate_proj(torch.cat((hidden, embedded), -1)).sigmoid() * embedded, state
        gate, candidate, output = self.joint_proj(torch.cat((state, embedded, hidden), -1)).chunk(3, -1)
        kept = gate.sigmoid()
        return output.tanh(), kept * state + (1 - kept) * candidate.tanh()

    def vectors(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Return the bias's vectors ``[..., K, r]`` of whole blocks, whose tokens before are known.

        Args:
            embedded: ``[..., K, r]``.
            hidden: ``[..., K, H]``.
        """
        state = self.start(hidden)
        if self.kind != "rnn":
            return self.step(embedded, hidden, state)[0]
        vectors = []
        for before, slot in zip(embedded.unbind(-2), hidden.unbind(-2), strict=True):
            vector, state = self.step(before, slot, state)
            vectors.append(vector)
        return torch.stack(vectors, -2)

    def bias(self, vector: Tensor) -> Tensor:
        """Return the bias ``[..., V]`` of vectors ``[..., r]``."""
        return linear(vector, self.markov_w2.weight)


class ConfidenceHead(nn.Module):
    """How likely the target is to keep a slot's token, as a logit."""

    def __init__(self, config: DSparkConfig) -> None:
        super().__init__()
        self.with_markov = config.confidence_head_with_markov
        self.proj = nn.Linear(config.hidden_size + config.markov_rank * self.with_markov, 1)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Return logits ``[...]`` of slots ``[..., H]`` whose token before is `embedded` ``[..., r]``."""
        logits: Tensor = self.proj(torch.cat((hidden, embedded), -1) if self.with_markov else hidden)
        return logits.squeeze(-1)


class DSparkDraft(DFlashDraft):
    """A DSpark draft model; see `DFlashDraft`.

    Args:
        config: a `DSparkConfig`, or a dict in DeepSpec's format.

    Raises:
        IncompatibleDraft: the config cannot be used.
    """

    method = "dspark"
    config_type = DSparkConfig
    config: DSparkConfig
    confidence_head: ConfidenceHead | None

    def __init__(self, config: DSparkConfig | Mapping[str, Any]) -> None:
        super().__init__(config)
        self.markov_head = MarkovHead(self.config)
        self.confidence_head = ConfidenceHead(self.config) if self.config.enable_confidence_head else None
        for module in self.modules():
            if isinstance(module, (MarkovHead, ConfidenceHead)):
                _draw(module, self.config.initializer_range)


def _draw(head: nn.Module, deviation: float) -> None:
    """Draw a head's matrices, normal with `deviation`; biases start at 0."""
    for parameter in head.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=deviation)
        else:
            nn.init.zeros_(parameter)
