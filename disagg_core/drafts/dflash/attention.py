"""Attention of blocks: each slot sees its sample's context before the block's anchor, and slots of its own block.

No kernel writes a mask or scores of all slots by all keys:

- `gathered` (any device and dtype) takes a few neighbouring blocks of one sample at a time, the context up to the last
  of their anchors and their own slots, under one softmax; the backward pass computes the scores again from the saved
  logsumexp. It skips what none of its blocks sees, in windows also what lies before them.
- `flex` (CUDA) runs PyTorch's FlexAttention over all blocks at once, with the same pattern as a block mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from disagg_core.drafts.dflash.batch import BlockPlan
from disagg_core.drafts.dflash.config import LayerMask
from disagg_core.drafts.flex import TILE, Range, flex_on, ranges_mask
from disagg_core.drafts.linear import outer, product

AttentionKernel = Literal["gathered", "flex"]

_SCORE_BYTES = {"cpu": 1 * 1024**2, "cuda": 256 * 1024**2}
"""Bytes of the scores of one piece for one key head: on CPU about what a core's cache holds."""


class BlockAttention:
    """The attention of one batch's blocks, for all layers.

    Args:
        plan: the batch's blocks.
        kernel: see the module.
    """

    def __init__(self, plan: BlockPlan, kernel: AttentionKernel) -> None:
        self._plan, self._kernel = plan, kernel
        self._patterns: dict[LayerMask, BlockMask] = {}

    def whole(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of all context rows, of those of this rank ``[n, kv_heads, d]``: its own, or gathered.

        A collective where ranks share the batch; differentiable.
        """
        plan = self._plan
        if plan.context is None or not plan.context_rows:
            return keys, values
        keys, values = plan.context.gather(torch.cat((keys, values), dim=1), plan.context_rows).chunk(2, dim=1)
        return keys, values

    def __call__(
        self, mask: LayerMask, query: Tensor, own: tuple[Tensor, Tensor], context: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the attention's result ``[M, K, heads, d]``; differentiable.

        Args:
            mask: the layer's.
            query: ``[M, K, heads, d]``, rotated.
            own: keys (rotated) and values of the slots, ``[M, K, kv_heads, d]``.
            context: keys (rotated) and values of the context rows, ``[rows, kv_heads, d]``.
        """
        if self._kernel == "flex":
            if mask not in self._patterns:
                self._patterns[mask] = flex_mask(self._plan, mask, query.shape[2] // context[0].shape[1])
            return _flex(self._patterns[mask], query, own, context)
        result: Tensor = _Gathered.apply(self._plan, mask, query, *own, *context)  # type: ignore[no-untyped-call]
        return result


# --- gathered ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """Blocks `first` to `last` (not included) of one sample, which see the context rows `rows`."""

    first: int
    last: int
    rows: slice
    position: int  # of the first of the rows

    def queries(self, per_block: int) -> slice:
        """The piece's rows where each block has so many."""
        return slice(self.first * per_block, self.last * per_block)


def _pieces(plan: BlockPlan, mask: LayerMask, group: int, device: str) -> Iterator[_Piece]:
    """Cut the blocks so that a piece's scores for one key head, `group` query heads, keep to the budget."""
    for first, last, row, _ in plan.samples:
        at = first
        while at < last:
            begin = 0 if mask.window is None else max(0, plan.bounds[at] - mask.window)
            end = at + 1
            while end < last:
                keys = plan.bounds[end] - begin + plan.block_size
                if 4 * group * plan.block_size * (end + 1 - at) * keys > _SCORE_BYTES[device]:
                    break
                end += 1
            yield _Piece(at, end, slice(row + begin, row + plan.bounds[end - 1]), begin)
            at = end


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: BlockPlan,
        mask: LayerMask,
        query: Tensor,
        own_key: Tensor,
        own_value: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        group, scale = query.shape[2] // key.shape[1], 1.0 / math.sqrt(query.shape[3])
        work = torch.float64 if query.dtype == torch.float64 else torch.float32
        parts = _Parts.of(plan, mask, query, own_key, own_value, key, value, scale)
        output = torch.empty_like(parts.query)
        logsumexp = parts.query.new_empty(*output.shape[:2], 1, dtype=work)
        for piece in _pieces(plan, mask, group, query.device.type):
            at = piece.queries(plan.block_size * group)
            for head in range(key.shape[1]):
                far, near = parts.scores(piece, head)
                top = near.amax(-1, keepdim=True)
                if far.shape[1]:
                    top = torch.maximum(top, far.amax(-1, keepdim=True))
                far, near = far.sub_(top).exp_(), near.sub_(top).exp_()
                total = far.sum(-1, keepdim=True) + near.sum(-1, keepdim=True)
                result = parts.mixed(piece, head, far, near)
                output[head, at] = result.div_(total.to(result.dtype))
                logsumexp[head, at] = top + total.log()
        ctx.plan, ctx.mask, ctx.scale = plan, mask, scale
        result = _by_slot(output, query.shape)
        ctx.save_for_backward(query, own_key, own_value, key, value, result, logsumexp)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, mask, scale = ctx.plan, ctx.mask, ctx.scale
        query, own_key, own_value, key, value, output, logsumexp = ctx.saved_tensors
        kv_heads, group = key.shape[1], query.shape[2] // key.shape[1]
        inner = (grads[0] * output).sum(-1, keepdim=True).to(logsumexp.dtype)
        grad, inner = _by_head(grads[0], kv_heads), _by_head(inner, kv_heads)
        parts = _Parts.of(plan, mask, query, own_key, own_value, key, value, scale)
        into = parts.empty_gradients()
        for piece in _pieces(plan, mask, group, query.device.type):
            at = piece.queries(plan.block_size * group)
            for head in range(kv_heads):
                far, near = parts.scores(piece, head)
                limit, slope_inner, by = logsumexp[head, at], inner[head, at], grad[head, at]
                far, near = far.sub_(limit).exp_(), near.sub_(limit).exp_()
                parts.add_gradients(into, piece, head, far, near, by, slope_inner)
        grad_query = _by_slot(into.query.mul_(scale), query.shape)
        own = (_by_slot(x, own_key.shape) for x in (into.own_key, into.own_value))
        return None, None, grad_query, *own, into.key.transpose(0, 1), into.value.transpose(0, 1)


@dataclass(frozen=True)
class _Parts:
    """The tensors of an attention by key head: slots ``[kv_heads, n, d]``, each query `group` times in its row."""

    plan: BlockPlan
    mask: LayerMask
    group: int
    query: Tensor  # [kv_heads, M * K * group, d], scaled
    own_key: Tensor  # [kv_heads, M * K, d]
    own_value: Tensor
    key: Tensor  # [kv_heads, context rows, d]
    value: Tensor

    @classmethod
    def of(
        cls,
        plan: BlockPlan,
        mask: LayerMask,
        query: Tensor,
        own_key: Tensor,
        own_value: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
    ) -> _Parts:
        kv_heads = key.shape[1]
        own = (_by_head(x, kv_heads) for x in (own_key, own_value))
        context = (x.transpose(0, 1).contiguous() for x in (key, value))
        return cls(plan, mask, query.shape[2] // kv_heads, _by_head(query * scale, kv_heads), *own, *context)

    def empty_gradients(self) -> _Parts:
        """Return zeros to add gradients to, by the same parts."""
        tensors = (self.query, self.own_key, self.own_value, self.key, self.value)
        return _Parts(self.plan, self.mask, self.group, *(torch.zeros_like(x) for x in tensors))

    def scores(self, piece: _Piece, head: int) -> tuple[Tensor, Tensor]:
        """Return the piece's masked scores with the context ``[n, rows]`` and with the own block ``[n, K]``."""
        work = torch.float64 if self.query.dtype == torch.float64 else torch.float32
        rows = self.query[head, piece.queries(self.plan.block_size * self.group)]
        far = product(rows, self.key[head, piece.rows].t()).to(work)
        blocks = self._blocks(piece, head, self.own_key)
        near = torch.bmm(rows.view(len(blocks), -1, rows.shape[1]), blocks.transpose(1, 2)).flatten(0, 1).to(work)
        self._hide(piece, far, near)
        return far, near

    def mixed(self, piece: _Piece, head: int, far: Tensor, near: Tensor) -> Tensor:
        """Return the sum of values ``[n, d]`` with these weights."""
        dtype = self.query.dtype
        blocks = self._blocks(piece, head, self.own_value)
        by_block = near.to(dtype).view(len(blocks), -1, self.plan.block_size)
        result = torch.bmm(by_block, blocks).flatten(0, 1)
        if far.shape[1]:
            result += product(far.to(dtype), self.value[head, piece.rows])
        return result

    def add_gradients(
        self, into: _Parts, piece: _Piece, head: int, far: Tensor, near: Tensor, by: Tensor, inner: Tensor
    ) -> None:
        """Add the piece's gradients; `far` and `near` are probabilities, `by` [n, d] the output's gradient."""
        size, dtype = self.plan.block_size, self.query.dtype
        at, slots = piece.queries(size * self.group), piece.queries(size)
        query = self.query[head, at]
        keys, values = self._blocks(piece, head, self.own_key), self._blocks(piece, head, self.own_value)
        by_block = by.view(len(keys), -1, by.shape[1])
        near_block = near.to(dtype).view(len(keys), -1, size)
        into.own_value[head, slots] = torch.bmm(near_block.transpose(1, 2), by_block).flatten(0, 1)
        slope = torch.bmm(by_block, values.transpose(1, 2)).flatten(0, 1).to(near.dtype).sub_(inner).mul_(near)
        slope_block = slope.to(dtype).view(len(keys), -1, size)
        into.own_key[head, slots] = torch.bmm(
            slope_block.transpose(1, 2), query.view(len(keys), -1, query.shape[1])
        ).flatten(0, 1)
        into.query[head, at] = torch.bmm(slope_block, keys).flatten(0, 1)
        if far.shape[1]:
            into.value[head, piece.rows] += outer(far.to(dtype), by)
            slope = product(by, self.value[head, piece.rows].t()).to(far.dtype).sub_(inner).mul_(far).to(dtype)
            into.query[head, at] += product(slope, self.key[head, piece.rows])
            into.key[head, piece.rows] += outer(slope, query)

    def _blocks(self, piece: _Piece, head: int, slots: Tensor) -> Tensor:
        """Return the piece's `slots` ``[blocks, K, d]``."""
        return slots[head, piece.queries(self.plan.block_size)].view(piece.last - piece.first, -1, slots.shape[-1])

    def _hide(self, piece: _Piece, far: Tensor, near: Tensor) -> None:
        """Exclude from the scores what the mask does, in place."""
        size, device = self.plan.block_size, far.device
        anchors = self.plan.anchors[piece.first : piece.last]
        slots = torch.arange(size, device=device)
        if self.mask.causal:
            near.view(len(anchors), size, self.group, size).masked_fill_(
                slots[None, :] > slots[:, None, None], -math.inf
            )
        by_block = far.view(len(anchors), size * self.group, far.shape[1])
        open_from = self.plan.bounds[piece.first] - piece.position  # later rows are hidden from some block
        late = torch.arange(open_from, far.shape[1], device=device) >= (anchors - piece.position)[:, None]
        by_block[:, :, open_from:].masked_fill_(late[:, None, :], -math.inf)
        if self.mask.window is not None:
            begin = (anchors - piece.position)[:, None] + self.mask.first_seen(slots)  # [blocks, K]
            early = torch.arange(far.shape[1], device=device) < begin[:, :, None]
            far.view(len(anchors), size, self.group, far.shape[1]).masked_fill_(early[:, :, None, :], -math.inf)


def _by_head(x: Tensor, kv_heads: int) -> Tensor:
    """Turn ``[M, K, heads, d]`` into ``[kv_heads, M * K * group, d]``, contiguous."""
    rows = x.flatten(0, 1)
    return rows.view(len(rows), kv_heads, -1, x.shape[-1]).transpose(0, 1).reshape(kv_heads, -1, x.shape[-1])


def _by_slot(x: Tensor, shape: torch.Size) -> Tensor:
    """Turn ``[kv_heads, M * K * group, d]`` back into `shape` ``[M, K, heads, d]``."""
    return x.view(x.shape[0], shape[0] * shape[1], -1, x.shape[2]).transpose(0, 1).reshape(shape)


# --- flex --------------------------------------------------------------------------------------------------------


def _flex(pattern: BlockMask, query: Tensor, own: tuple[Tensor, Tensor], context: tuple[Tensor, Tensor]) -> Tensor:
    """Return the attention's result, see `BlockAttention`; the query heads of a key head are entries of a batch.

    The backward pass goes through all queries that see a tile of keys one after the other, those of all query heads of
    a batch's entry. Every block sees the early context: in a batch of one its tiles would outlast all others.
    """
    rows, kv_heads = query.flatten(0, 1), context[0].shape[1]
    grouped = torch.unflatten(rows, 1, (kv_heads, -1)).permute(2, 1, 0, 3)  # [group, kv_heads, M * K, d]
    between = _to_whole_tiles(len(context[0]))
    keys, values = (
        torch.cat((far, far.new_zeros(between, *far.shape[1:]), near.flatten(0, 1))).transpose(0, 1)[None]
        for far, near in zip(context, own, strict=True)
    )
    output: Tensor = flex_on(query.device)(grouped, keys, values, block_mask=pattern)
    return output.permute(2, 1, 0, 3).reshape(query.shape)


def _to_whole_tiles(rows: int) -> int:
    """Return how many rows are missing to whole tiles: a tile of slots begins where a tile of keys does."""
    return -rows % TILE


def flex_mask(plan: BlockPlan, mask: LayerMask, entries: int) -> BlockMask:
    """Return the pattern of all M * K slots by the context rows, in whole tiles, with the slots after them.

    It is the same for so many `entries` of a batch.
    """
    slots = torch.arange(plan.block_size, device=plan.anchors.device)
    begin, end = plan.context_start[:, None], (plan.context_start + plan.anchors)[:, None]
    if mask.window is not None:
        begin = torch.maximum(begin, end + mask.first_seen(slots))
    first_own = plan.context_rows + _to_whole_tiles(plan.context_rows)
    own = first_own + torch.arange(plan.blocks, device=slots.device)[:, None] * plan.block_size
    far = (begin, end)
    near = (own, own + (slots + 1 if mask.causal else plan.block_size))
    by_slot = (Range(*(bound.expand(-1, plan.block_size).flatten() for bound in seen)) for seen in (far, near))
    return ranges_mask(first_own + plan.blocks * plan.block_size, *by_slot, entries=entries)
