"""Attention of the training rows: the real slots up to a row's anchor, and the earlier slots of its own chain.

The rule for a query (anchor a, depth d) and a key (anchor b, depth e) of one sequence: ``e == 0 and b <= a``, with a
window W also ``b > a + d - W``; or ``b == a and e <= d``. Rows are sorted by anchor, so that a slice of them sees a
run of real slots and chains that lie within the slice itself: the rule is written out for one slice at a time, in the
backward pass again, and no mask over all rows is ever there.

Where ranks share the rows, each has whole chains, and the keys and values of the real slots of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from disagg_core.drafts.context import Context
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
class SharedKeys:
    """How the keys of all ranks' real slots come together; index tensors are int64."""

    context: Context
    given: Tensor  # [most] this rank's rows that give one, filled up with others: `most` is the same on all ranks
    order: Tensor  # [n] where that of each real slot is among those gathered
    deep_rows: Tensor  # this rank's rows of other depths, which stay with it

    def together(self, values: Tensor) -> Tensor:
        """Return ``[n + deep rows, ...]`` of this rank's `values` ``[rows, ...]``. A collective; differentiable."""
        gathered = self.context.gather(values[self.given], self.context.size * len(self.given))
        return torch.cat((gathered[self.order], values[self.deep_rows]))


@dataclass(frozen=True)
class AttentionPlan:
    """Which row sees which; index tensors are int64 on the draft's device.

    Rows are sorted by sequence, anchor and depth. Rows from `real` on are padding: they see nothing and are not seen.
    Keys are those of the rows or, where ranks share the rows, those that `shared` puts together.
    """

    slices: tuple[Slice, ...]
    anchors: Tensor  # [rows]
    depths: Tensor  # [rows]
    key_rows: Tensor  # [n] keys of depth 0
    key_anchors: Tensor  # [n]
    deep_rows: Tensor  # [deep] keys of other depths
    deep_anchors: Tensor  # [deep]
    deep_depths: Tensor  # [deep]
    real: int
    window: int | None
    shared: SharedKeys | None = None


def plan_attention(
    sequences: Tensor,
    anchors: Tensor,
    depths: Tensor,
    window: int | None,
    device: torch.device,
    share: Share | None = None,
) -> AttentionPlan:
    """Return the plan of rows sorted by sequence, anchor and depth.

    Args:
        sequences: ``[rows]``, in host memory; which sequence a row is of, `PADDING` (of the last rows) for none.
        anchors: ``[rows]``, in host memory.
        depths: ``[rows]``, in host memory.
        window: W.
        device: of the draft.
        share: which of the rows this rank has; none of them is padding then.
    """
    real = int((sequences != PADDING).sum())
    keys = depths[:real] == 0
    seen = torch.cat((torch.zeros(1, dtype=torch.int64), keys.cumsum(0)))  # real slots before each row
    rows = torch.arange(real) if share is None else share.rows
    is_key = depths[rows] == 0
    keys_before = torch.cat((torch.zeros(1, dtype=torch.int64), is_key.cumsum(0)))  # the same among this rank's rows
    slices = []
    for start, stop in _cuts(sequences[rows], anchors[rows], _SLICE_ROWS[device.type]):
        first_row = int((sequences[:real] == sequences[rows[start]]).to(torch.int8).argmax())
        low, high = int(seen[first_row]), int(seen[rows[stop - 1] + 1])
        if window is not None:
            within = anchors[:real][keys][low:high] > anchors[rows[start]] - window
            low = high - int(within.sum())
        deep = slice(start - int(keys_before[start]), stop - int(keys_before[stop]))
        slices.append(Slice(slice(start, stop), slice(low, high), deep))
    deep_rows, count = (~is_key).nonzero().flatten(), int(keys.sum())
    tensors = {
        "anchors": anchors if share is None else anchors[rows],
        "depths": depths if share is None else depths[rows],
        "key_rows": is_key.nonzero().flatten() if share is None else torch.arange(count),
        "key_anchors": anchors[:real][keys],
        "deep_rows": deep_rows if share is None else count + torch.arange(len(deep_rows)),
        "deep_anchors": anchors[rows][deep_rows],
        "deep_depths": depths[rows][deep_rows],
    }
    return AttentionPlan(
        slices=tuple(slices),
        real=real,
        window=window,
        shared=None if share is None else _moved(share.keys(keys, deep_rows), device),
        **{name: uploaded(tensor, device) for name, tensor in tensors.items()},
    )


def _moved(keys: SharedKeys, device: torch.device) -> SharedKeys:
    given, order, deep_rows = (uploaded(x, device) for x in (keys.given, keys.order, keys.deep_rows))
    return SharedKeys(keys.context, given, order, deep_rows)


@dataclass(frozen=True)
class Share:
    """Which rows each of the ranks of `context` has, by whole chains; all in host memory."""

    context: Context
    owner: Tensor  # [all rows] int64
    rows: Tensor  # this rank's, at least one
    counted: bool  # whether they are: a rank without rows of its own computes one that counts for another

    @classmethod
    def of(cls, depths: Tensor, context: Context) -> Share:
        """Return how rows of these `depths`, sorted by chain, are shared: about equally many, early and late ones."""
        starts = depths == 0
        owner = context.mirrored(len(depths))[starts.nonzero().flatten()][starts.cumsum(0) - 1]
        rows = (owner == context.rank).nonzero().flatten()
        return cls(context, owner, rows if len(rows) else torch.zeros(1, dtype=torch.int64), bool(len(rows)))

    def keys(self, is_key: Tensor, deep_rows: Tensor) -> SharedKeys:
        """Return how keys come together, of all rows that are real slots (`is_key`) and this rank's `deep_rows`."""
        owners = self.owner[is_key]
        counts = torch.bincount(owners, minlength=self.context.size)
        most = int(counts.max())
        place = torch.empty_like(owners)
        for rank, count in enumerate(counts.tolist()):
            place[owners == rank] = rank * most + torch.arange(count)
        own = is_key[self.rows].nonzero().flatten()
        given = own[torch.arange(most).clamp(max=len(own) - 1)]
        return SharedKeys(self.context, given, place, deep_rows)


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
    if plan.shared is not None:
        key, value = plan.shared.together(torch.cat((key, value), dim=1)).chunk(2, dim=1)
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
    known = plan.key_anchors[piece.keys]
    visible = known <= anchors
    if plan.window is not None:
        visible &= known > anchors + depths - plan.window
    own = (plan.deep_anchors[piece.deep] == anchors) & (plan.deep_depths[piece.deep] <= depths)
    heads = query.shape[1]
    keys, values = (
        torch.cat(pair).repeat_interleave(heads // key.shape[1], dim=1).transpose(0, 1)[None]
        for pair in ((key, own_key), (value, own_value))
    )
    mask = torch.cat((visible, own), dim=1)
    attended = F.scaled_dot_product_attention(query.transpose(0, 1)[None], keys, values, attn_mask=mask)
    return attended[0].transpose(0, 1)
