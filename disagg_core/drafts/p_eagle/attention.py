"""Attention of the training rows: the real slots up to a row's anchor, and the earlier slots of its own chain.

The rule for a query (anchor a, depth d) and a key (anchor b, depth e) of one sequence: ``e == 0 and b <= a``, with a
window W also ``b > a + d - W``; or ``b == a and e <= d``. Rows are sorted by anchor, so that a slice of them sees a
run of real slots and chains that lie within the slice itself: the rule is written out for one slice at a time, in the
backward pass again, and no mask over all rows is ever there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from disagg_core.drafts.upload import uploaded

_SLICE_ROWS = {"cpu": 192, "cuda": 2048}
"""Rows of a slice, about: a slice computes every key that its last row sees for all its rows."""
PADDING = -1
"""Sequence of rows that are none's."""


@dataclass(frozen=True)
class Slice:
    """Rows `rows` of one sequence, the real slots `keys` that they see, and the rows `deep` of their chains."""

    rows: slice
    keys: slice  # among the depth-0 rows
    deep: slice  # among the rows of other depths


@dataclass(frozen=True)
class AttentionPlan:
    """Which row sees which; index tensors are int64 on the draft's device.

    Rows are sorted by sequence, anchor and depth. Rows from `real` on are padding: they see nothing and are not seen.
    """

    slices: tuple[Slice, ...]
    anchors: Tensor  # [rows]
    depths: Tensor  # [rows]
    key_rows: Tensor  # [n] rows of depth 0
    deep_rows: Tensor  # [rows - n] rows of other depths
    real: int
    window: int | None


def plan_attention(
    sequences: Tensor, anchors: Tensor, depths: Tensor, window: int | None, device: torch.device
) -> AttentionPlan:
    """Return the plan of rows sorted by sequence, anchor and depth.

    Args:
        sequences: ``[rows]``, in host memory; which sequence a row is of, `PADDING` (of the last rows) for none.
        anchors: ``[rows]``, in host memory.
        depths: ``[rows]``, in host memory.
        window: W.
        device: of the draft.
    """
    real = int((sequences != PADDING).sum())
    is_key = depths[:real] == 0
    keys_before = torch.cat((torch.zeros(1, dtype=torch.int64), is_key.cumsum(0)))  # of the rows before each
    slices = []
    for start, stop in _cuts(sequences[:real], anchors[:real], _SLICE_ROWS[device.type]):
        first_row = int((sequences[:real] == sequences[start]).to(torch.int8).argmax())
        low, high = int(keys_before[first_row]), int(keys_before[stop])
        if window is not None:
            seen = anchors[:real][is_key][low:high] > anchors[start] - window
            low = high - int(seen.sum())
        deep = slice(start - int(keys_before[start]), stop - int(keys_before[stop]))
        slices.append(Slice(slice(start, stop), slice(low, high), deep))
    return AttentionPlan(
        slices=tuple(slices),
        anchors=uploaded(anchors, device),
        depths=uploaded(depths, device),
        key_rows=uploaded(is_key.nonzero().flatten(), device),
        deep_rows=uploaded((~is_key).nonzero().flatten(), device),
        real=real,
        window=window,
    )


def _cuts(sequences: Tensor, anchors: Tensor, size: int) -> Iterator[tuple[int, int]]:
    """Cut the rows into runs of about `size` that hold whole chains of one sequence."""
    chain_starts = torch.ones(len(anchors) + 1, dtype=torch.bool)
    new_sequence = torch.zeros(len(anchors) + 1, dtype=torch.bool)
    new_sequence[1:-1] = sequences[1:] != sequences[:-1]
    new_sequence[-1] = True
    chain_starts[1:-1] = (anchors[1:] != anchors[:-1]) | new_sequence[1:-1]
    start = last = 0
    for place in chain_starts.nonzero().flatten().tolist():
        if place - start > size and last > start:
            yield start, last
            start = last
        last = place
        if bool(new_sequence[place]) and place > start:
            yield start, place
            start = place


def chain_attention(plan: AttentionPlan, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the attention's result ``[rows, heads, d]``, zero for padding; differentiable.

    Args:
        plan: of the rows.
        query: ``[rows, heads, d]``, rotated.
        key: ``[rows, kv_heads, d]``, rotated.
        value: ``[rows, kv_heads, d]``.
    """
    result: Tensor = _Sliced.apply(plan, query, key, value)  # type: ignore[no-untyped-call]
    return result


class _Sliced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: AttentionPlan, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(query, key, value)
        output = torch.zeros_like(query)
        sides = [(x[plan.key_rows], x[plan.deep_rows]) for x in (key, value)]
        for piece in plan.slices:
            seen = [side[place] for pair in sides for side, place in zip(pair, (piece.keys, piece.deep), strict=True)]
            output[piece.rows] = _attend(plan, piece, query[piece.rows], *seen)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: AttentionPlan = ctx.plan
        query, key, value = ctx.saved_tensors
        by_query = torch.zeros_like(query)
        sides = [x[rows] for x in (key, value) for rows in (plan.key_rows, plan.deep_rows)]
        work = torch.float64 if query.dtype == torch.float64 else torch.float32  # many slices add to one key
        by_sides = [torch.zeros_like(side, dtype=work) for side in sides]
        for piece in plan.slices:
            places = (piece.keys, piece.deep, piece.keys, piece.deep)
            with torch.enable_grad():
                inputs = [query[piece.rows], *(side[place] for side, place in zip(sides, places, strict=True))]
                inputs = [x.detach().requires_grad_() for x in inputs]
                output = _attend(plan, piece, *inputs)
            found = torch.autograd.grad(output, inputs, grads[0][piece.rows])
            by_query[piece.rows] = found[0]
            for total, place, part in zip(by_sides, places, found[1:], strict=True):
                total[place] += part
        by_key, by_value = torch.zeros_like(key), torch.zeros_like(value)
        for total, (real, deep) in ((by_key, by_sides[:2]), (by_value, by_sides[2:])):
            total.index_copy_(0, plan.key_rows, real.to(total.dtype))
            total.index_copy_(0, plan.deep_rows, deep.to(total.dtype))
        return None, by_query, by_key, by_value


def _attend(
    plan: AttentionPlan, piece: Slice, query: Tensor, key: Tensor, own_key: Tensor, value: Tensor, own_value: Tensor
) -> Tensor:
    """Return the result ``[n, heads, d]`` of a slice's rows over real slots and the slice's own chains."""
    anchors, depths = plan.anchors[piece.rows, None], plan.depths[piece.rows, None]
    known = plan.anchors[plan.key_rows[piece.keys]]
    visible = known <= anchors
    if plan.window is not None:
        visible &= known > anchors + depths - plan.window
    chain = plan.deep_rows[piece.deep]
    own = (plan.anchors[chain] == anchors) & (plan.depths[chain] <= depths)
    heads = query.shape[1]
    keys, values = (
        torch.cat(pair).repeat_interleave(heads // key.shape[1], dim=1).transpose(0, 1)[None]
        for pair in ((key, own_key), (value, own_value))
    )
    mask = torch.cat((visible, own), dim=1)
    attended = F.scaled_dot_product_attention(query.transpose(0, 1)[None], keys, values, attn_mask=mask)
    return attended[0].transpose(0, 1)
