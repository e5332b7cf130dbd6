"""A frozen target with a KV cache over a batch of sequences of unlike lengths, and the states that a draft reads.

Sequences are padded on the left. After a verify pass the rows keep unlike numbers of new tokens: the cache is cropped
to the longest, and what a shorter row does not keep stays in it as a hole, masked out and without a position. A model
with sliding windows counts slots and not positions, so for those a batch is one sequence, which has no holes.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from disagg_core.errors import TargetError
from disagg_core.target.facts import check_aux_layers, default_aux_layers

_CROPPABLE = {"full_attention", "sliding_attention", "chunked_attention"}


@dataclass(frozen=True)
class TargetStep:
    """What a target says about the tokens it was given."""

    logits: Tensor  # [batch, tokens, V]; after a prefill of the last token only: [batch, 1, V]
    aux: Tensor  # [batch, tokens, 3 * H_t], the three captured layers, low to high


class TargetRunner:
    """Runs a transformers causal language model over a batch with one cache.

    Args:
        target: the model; it is not changed (the hooks that read its layers are removed by `close`).
        aux_layers: decoder layers whose outputs are captured; by default chosen from the depth.

    Raises:
        TargetError: no decoder layers are found, they lack an aux layer, or the model keeps a recurrent state, which
            cannot be rolled back to the accepted prefix.
    """

    def __init__(self, target: nn.Module, aux_layers: Sequence[int] | None = None) -> None:
        model: Any = target
        config = model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds - _CROPPABLE:
            raise TargetError(
                f"evaluation: expected attention layers only, found {sorted(kinds - _CROPPABLE)} in "
                f"{config.model_type}: their state cannot be rolled back after a rejected token"
            )
        self.one_by_one = kinds != {"full_attention"} or bool(getattr(config, "sliding_window", None))
        self._target = target
        self._decoder_layers = _decoder_layers(model)
        depth = len(self._decoder_layers)
        low, middle, high = aux_layers or default_aux_layers(depth)
        self._aux_layers = check_aux_layers((low, middle, high), depth)
        self._captured: dict[int, Tensor] = {}
        self._hooks = [
            self._decoder_layers[layer].register_forward_hook(self._keeper(layer)) for layer in self._aux_layers
        ]
        self._last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.device: torch.device = model.get_input_embeddings().weight.device
        self._cache = DynamicCache()
        self._mask = torch.empty(0, 0, dtype=torch.int64)
        self.lengths = torch.empty(0, dtype=torch.int64)

    def close(self) -> None:
        """Remove the hooks from the target's layers."""
        for hook in self._hooks:
            hook.remove()

    def _keeper(self, layer: int) -> Any:
        def keep(_module: nn.Module, _args: object, output: Any) -> None:
            self._captured[layer] = output[0] if isinstance(output, tuple) else output

        return keep

    def prefill(self, prompts: Sequence[Sequence[int]]) -> TargetStep:
        """Start over with `prompts`; the aux states are padded on the left as they are."""
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=self.device)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        pads = longest - self.lengths[:, None]
        place = torch.arange(longest, device=self.device)[None, :]
        self._cache = DynamicCache()
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
        if of > most:
            self._cache.crop(most - of)  # transformers 5: minus the number of tokens to drop
            self._mask = self._mask[:, : most - of]
        fresh = torch.arange(most, device=self.device)[None, :] < counts[:, None]
        self._mask = torch.cat((self._mask[:, : self._mask.shape[1] - most], fresh.long()), dim=1)
        self.lengths = self.lengths + counts

    def select(self, rows: Tensor) -> None:
        """Go on with these `rows` [remaining] of the batch only."""
        self._cache.batch_select_indices(rows)
        self._mask, self.lengths = self._mask[rows], self.lengths[rows]

    def _run(self, ids: Tensor, positions: Tensor, **options: int) -> TargetStep:
        output = self._target(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **options,
        )
        aux = torch.cat([self._captured[layer].to(self.device) for layer in self._aux_layers], dim=-1)
        self._captured.clear()
        return TargetStep(output.logits[:, -1:] if options else output.logits, aux)


def _decoder_layers(model: Any) -> nn.ModuleList:
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise TargetError(
            f"evaluation: expected a decoder with a list of layers called 'layers', found {type(decoder).__name__}"
        )
    return layers
