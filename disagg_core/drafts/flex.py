"""FlexAttention and the making of its masks: compiled once for all that use them, and as they are on a CPU.

One graph serves rows of every length, as long as a mask's function reads nothing of a batch but tensors and plain
numbers. What else it reaches for is compiled in as it was, and after some batches torch gives up and runs eagerly, with
all scores in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether, of a batch and a head, a row sees a key."""


def compiles(device: torch.device) -> bool:
    """Tell whether what runs on `device` is compiled."""
    return device.type == "cuda"


def flex_on(device: torch.device) -> Any:
    """Return FlexAttention for tensors on `device`."""
    return _compiled_flex() if compiles(device) else flex_attention


def block_mask(sees: Sees, rows: int, keys: int, device: torch.device) -> BlockMask:
    """Return the mask of `rows` queries by `keys` keys, the same for all heads of a batch of one."""
    make = _compiled_mask() if compiles(device) else create_block_mask
    mask: BlockMask = make(sees, 1, None, rows, keys, device=device)
    return mask


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)


@cache
def _compiled_mask() -> Any:
    return torch.compile(create_block_mask, dynamic=True)
