"""FlexAttention and the making of its masks: compiled once for all that use them, and as they are on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether, of a batch and a head, a row sees a key."""


def flex_on(device: torch.device) -> Any:
    """Return FlexAttention for tensors on `device`."""
    return _compiled_flex() if device.type == "cuda" else flex_attention


def block_mask(sees: Sees, rows: int, keys: int, device: torch.device) -> BlockMask:
    """Return the mask of `rows` queries by `keys` keys, the same for all heads of a batch of one."""
    make = _compiled_mask() if device.type == "cuda" else create_block_mask
    mask: BlockMask = make(sees, 1, None, rows, keys, device=device)
    return mask


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


@cache
def _compiled_mask() -> Any:
    return torch.compile(create_block_mask, dynamic=True)
