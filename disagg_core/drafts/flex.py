"""FlexAttention and its masks, and what else a GPU always runs compiled and a CPU as it is.

One graph serves rows of every length, as long as a mask's function reads nothing of a batch but tensors and plain
numbers. What else it reaches for is compiled in as it was, and after some batches torch gives up and runs eagerly, with
all scores in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether, of a batch and a head, a row sees a key."""
TILE = 128
"""Rows and keys of a mask's tiles."""
_T = TypeVar("_T")

_KERNEL = {"FORCE_USE_FLEX_ATTENTION": True}
"""PyTorch's other kernel, for fewer than 128 queries, has no choice that fits a mask of tiles of 128."""


class Range(NamedTuple):
    """The keys that each row sees, integer ``[rows]``: from `begin` up to `end`, which is not seen; none if equal."""

    begin: Tensor
    end: Tensor


def compiles(device: torch.device) -> bool:
    """Tell whether what runs on `device` is compiled."""
    return device.type == "cuda"


def flex_on(device: torch.device) -> Any:
    """Return FlexAttention for tensors on `device`."""
    return partial(_compiled_flex(), kernel_options=_KERNEL) if compiles(device) else flex_attention


@cache
def compiled(function: Callable[..., _T]) -> Callable[..., _T]:
    """Return `function` compiled, the same whenever it is asked for."""
    return torch.compile(function)


def rows_vary(*tensors: Tensor) -> None:
    """Have one graph serve any number of rows, the first dimension of `tensors`; other sizes are compiled in."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)


def ranges_mask(keys: int, *ranges: Range, entries: int = 1) -> BlockMask:
    """Return the mask of rows that each see one range, or two, of `keys` keys: the same for all `entries` of a batch.

    What a tile of rows sees of a tile of keys follows from where the ranges end, not from looking at every key.
    """
    assert 1 <= len(ranges) <= 2
    rows = len(ranges[0].begin)
    tiled = [Range(*(F.pad(bound.int(), (0, -rows % TILE)) for bound in one)) for one in ranges]
    seen, whole = _tiles(keys, tiled)
    return BlockMask.from_kv_blocks(
        *_ordered(seen & ~whole, entries),
        *_ordered(whole, entries),
        BLOCK_SIZE=TILE,
        mask_mod=_sees_one(*tiled) if len(tiled) == 1 else _sees_either(*tiled),
        seq_lengths=(rows, keys),
    )


def _tiles(keys: int, ranges: Sequence[Range]) -> tuple[Tensor, Tensor]:
    """Return which tiles of keys some row of a tile sees a key of, and which every row sees within one range.

    Args:
        keys: how many there are.
        ranges: of rows that fill their tiles.

    Returns:
        Two tensors, bool ``[row tiles, key tiles]``.
    """
    first = torch.arange(0, keys, TILE, dtype=torch.int32, device=ranges[0].begin.device)
    touched, within = [], []
    for one in ranges:
        begin, end = (bound.view(-1, TILE, 1) for bound in one)
        touched.append((begin < first + TILE) & (end > first) & (begin < end))
        within.append((begin <= first) & (end >= first + TILE))
    return torch.stack(touched).any(0).any(1), torch.stack(within).any(0).all(1)


def _ordered(tiles: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """Return of each row of `tiles`, bool ``[n, m]``, how many are set, and the numbers of all, the set ones first.

    Both as `BlockMask` has them: int32, ``[entries, 1, n]`` and ``[entries, 1, n, m]``, contiguous.
    """
    order = tiles.int().argsort(dim=-1, descending=True, stable=True)
    counts = tiles.sum(-1, dtype=torch.int32)
    return counts.repeat(entries, 1, 1), order.int().repeat(entries, 1, 1, 1)


def _sees_one(one: Range) -> Sees:
    begin, end = one

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key >= begin[row]) & (key < end[row])

    return sees


def _sees_either(one: Range, other: Range) -> Sees:
    (begin, end), (other_begin, other_end) = one, other

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return ((key >= begin[row]) & (key < end[row])) | ((key >= other_begin[row]) & (key < other_end[row]))

    return sees


@cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention, dynamic=True)
