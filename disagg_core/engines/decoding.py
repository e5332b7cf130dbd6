"""What makes decoding cheap in a model of transformers: a cache with room to grow, attention by groups of heads.

transformers' own cache is copied into a larger one at every step and layer, and beside a mask SDPA has keys and values
copied for each query head that shares them. The two are half the time of a step on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

_BY_GROUPS = "draftline_by_groups"


def cache_for(config: Any, room: int) -> DynamicCache:
    """Return a cache for a model of `config` that takes the prompts and `room` further tokens without being copied.

    Layers that keep less than every token (sliding windows, recurrent states) stay transformers' own.
    """
    cache = DynamicCache(config=config)
    cache.layers = [_RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, [rows, heads, tokens, head size], at the front of tensors that hold more tokens."""

    keys: Tensor
    values: Tensor

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if self._buffers is None or after > self._buffers[0].shape[-2]:
            self._buffers = self._grown(self.keys, key_states, after), self._grown(self.values, value_states, after)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, before:after] = new
        self.keys, self.values = (buffer[:, :, :after] for buffer in self._buffers)
        return self.keys, self.values

    def _grown(self, known: Tensor, new: Tensor, tokens: int) -> Tensor:
        rows, heads, _, size = new.shape
        buffer = new.new_empty(rows, heads, tokens + self._room, size)
        if known.numel():
            buffer[:, :, : known.shape[-2]] = known
        return buffer

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, ascending, and let the memory of the others go."""
        length = self.get_seq_length()
        if self._buffers is not None:
            self._buffers = self._buffers[0][indices], self._buffers[1][indices]
            self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


@contextmanager
def attention_by_groups(model: Any) -> Iterator[None]:
    """Let a causal language model of transformers decode with attention by groups of heads, inside the context.

    Another attention than SDPA, and that of a model whose parts have configs of their own, stays as it is.
    """
    config = model.config
    if config._attn_implementation != "sdpa" or config.get_text_config() is not config:
        yield
        return
    model.set_attn_implementation(_BY_GROUPS)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


def _by_groups(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """SDPA of one token a row, [rows, heads, 1, head size], with the heads of a group in the place of the tokens.

    All of them see the same tokens, so that the mask [rows, 1, 1, tokens] holds for each.
    """
    rows, heads, tokens, _ = query.shape
    groups = key.shape[1]
    plain = options.get("position_bias") is None and (attention_mask is None or attention_mask.shape[1] == 1)
    if tokens != 1 or groups == heads or not plain:
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output
    folded = query.reshape(rows, groups, heads // groups, -1)
    attended = scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=options.get("scaling"))
    return attended.reshape(rows, 1, heads, -1), None


AttentionInterface.register(_BY_GROUPS, _by_groups)
AttentionMaskInterface.register(_BY_GROUPS, sdpa_mask)
