"""What a GPU always runs compiled, and a CPU as it is: FlexAttention, the making of its masks, and what has to fuse.

One graph serves rows of every length, as long as a mask's function reads nothing of a batch but tensors and plain
numbers. What else it reaches for is compiled in as it was, and after some batches torch gives up and runs eagerly, with
all scores in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether, of a batch and a head, a row sees a key."""
_T = TypeVar("_T")

_KERNEL = {"FORCE_USE_FLEX_ATTENTION": True}
"""PyTorch's other kernel, for fewer than 128 queries, has no choice that fits a mask of tiles of 128."""


def compiles(device: torch.device) -> bool:
    """Tell whether what runs on `device` is compiled."""
    return device.type == "cuda"


def flex_on(device: torch.device) -> Any:
    """Return FlexAttention for tensors on `device`."""
    return partial(_compiled_flex(), kernel_options=_KERNEL) if compiles(device) else flex_attention


def fused(function: Callable[..., _T], device: torch.device) -> Callable[..., _T]:
    """Return `function` compiled where `compiles` says so, else as it is."""
    return compiled(function) if compiles(device) else function


@cache
def compiled(function: Callable[..., _T]) -> Callable[..., _T]:
    """Return `function` compiled, the same whenever it is asked for."""
    return torch.compile(function)


def rows_vary(*tensors: Tensor) -> None:
    """Have one graph serve any number of rows, the first dimension of `tensors`; other sizes are compiled in."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


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
