"""A frozen target with a KV cache over a batch of sequences of unlike lengths, and the states that a draft reads.

Sequences are padded on the left. After a verify pass the rows keep unlike numbers of new tokens: the cache is cropped
to the longest, and what a shorter row does not keep stays in it as a hole, masked out and without a position. A model
with sliding windows counts slots and not positions, so for those a batch is one sequence, which has no holes.

Layers that keep a recurrent state (linear attention, convolutions, state spaces) cannot go back to the accepted prefix.
A target that has some is run over the whole prefix again in every pass, one sequence at a time and without a cache:
slower, and the same tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from disagg_core.contracts import Capture
from disagg_core.target.layers import LayerStates

_CROPPABLE = {"attention", "full_attention", "sliding_attention", "chunked_attention"}


def rolls_back(target: nn.Module) -> bool:
    """Tell whether the cache of `target` can be cropped: whether all its layers attend, and none keeps a state."""
    model: Any = target
    return config_rolls_back(model.config, model)


def config_rolls_back(config: Any, model: Any) -> bool:
    """Tell the same from a transformers `config` and the model or its class."""
    skips = getattr(config.get_text_config(), "cross_attention_layers", ())  # layers for pictures, without a cache here
    return not skips and not getattr(model, "_is_stateful", False) and _kinds(config) <= _CROPPABLE


def _kinds(config: Any) -> set[str]:
    text = config.get_text_config()
    return set(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ["full_attention"])


@dataclass(frozen=True)
class TargetStep:
    """What a target says about the tokens it was given."""

    logits: Tensor  # [batch, tokens, V]; after a prefill of the last token only: [batch, 1, V]
    states: Tensor  # [batch, tokens, layers * H_t], the captured layers side by side, in the order asked for


class TargetRunner:
    """Runs a transformers causal language model over a batch with one cache.

    Args:
        target: the model; it is not changed (the hooks that read its layers are removed by `close`).
        layers: decoder layers whose outputs are captured, by 0-based index; any number of them.

    Raises:
        TargetError: no decoder layers are found, or they lack one of `layers`.
    """

    def __init__(self, target: nn.Module, layers: Sequence[int] = ()) -> None:
        model: Any = target
        config = model.config.get_text_config()
        self._rolls_back = rolls_back(model)
        self.one_by_one = _kinds(model.config) != {"full_attention"} or bool(getattr(config, "sliding_window", None))
        self.one_by_one |= not self._rolls_back
        self._target = target
        self._states = LayerStates(target, Capture(tuple(layers), last_hidden_state=False))
        self._last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.device: torch.device = model.get_input_embeddings().weight.device
        self._cache = DynamicCache()
        self._mask = torch.empty(0, 0, dtype=torch.int64)
        self._prefix = torch.empty(1, 0, dtype=torch.int64, device=self.device)  # of a target that is run over it again
        self.lengths = torch.empty(0, dtype=torch.int64)

    def close(self) -> None:
        """Remove the hooks from the target's layers."""
        self._states.close()

    def prefill(self, prompts: Sequence[Sequence[int]]) -> TargetStep:
        """Start over with `prompts`; the states are padded on the left as they are."""
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=self.device)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        pads = longest - self.lengths[:, None]
        place = torch.arange(longest, device=self.device)[None, :]
        self._cache = DynamicCache()
        self._prefix = self._prefix[:, :0]
        self._mask = (place >= pads).long()
        return self._run(ids, (place - pads).clamp(min=0), **({"logits_to_keep": 1} if self._last_only else {}))

    def extend(self, ids: Tensor) -> TargetStep:
        """Run the next tokens of every row, `ids` [batch, n]; `keep` then says how many of them stay."""
        steps = torch.arange(ids.shape[1], device=self.device)
        self._mask = torch.cat((self._mask, torch.ones_like(ids)), dim=1)
        return self._run(ids, self.lengths[:, None] + steps)

    def keep(self, counts: Tensor, of: int) -> None:
        """Keep the first `counts` [batch] of the `of` tokens that the last `extend` was given."""
        most = int(counts.max())
        if of > most and not self._rolls_back:
            self._prefix = self._prefix[:, : most - of]
        elif of > most:
            self._cache.crop(most - of)  # transformers 5: minus the number of tokens to drop
        if of > most:
            self._mask = self._mask[:, : most - of]
        fresh = torch.arange(most, device=self.device)[None, :] < counts[:, None]
        self._mask = torch.cat((self._mask[:, : self._mask.shape[1] - most], fresh.long()), dim=1)
        self.lengths = self.lengths + counts

    def select(self, rows: Tensor) -> None:
        """Go on with these `rows` [remaining] of the batch only."""
        if self._rolls_back:
            self._cache.batch_select_indices(rows.cpu())  # of a target on several GPUs, each holds its layers' part
        self._mask, self.lengths = self._mask[rows], self.lengths[rows]

    def _run(self, ids: Tensor, positions: Tensor, **options: int) -> TargetStep:
        if not self._rolls_back:
            return self._run_again(ids)
        output = self._target(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **options,
        )
        logits: Tensor = output.logits
        captured = [state.to(self.device) for state in self._states.layers]
        self._states.clear()
        states = torch.cat(captured, dim=-1) if captured else logits.new_empty(*ids.shape, 0)
        return TargetStep(logits[:, -1:] if options else logits, states)

    def _run_again(self, ids: Tensor) -> TargetStep:
        """Run prefix and `ids` [1, n] from the start."""
        new = ids.shape[1]
        self._prefix = torch.cat((self._prefix, ids), dim=1)
        logits: Tensor = self._target(input_ids=self._prefix, use_cache=False).logits
        captured = [state[:, -new:].to(self.device) for state in self._states.layers]
        self._states.clear()
        states = torch.cat(captured, dim=-1) if captured else logits.new_empty(1, new, 0)
        return TargetStep(logits[:, -new:], states)
