"""Context parallelism: ranks that share one packed row of samples, each computing some of its positions.

What a position computes by itself (projections, MLP, vocabulary) needs its own rank only. Attention needs the keys and
values of the positions before: each rank makes those of an equal part, and they are gathered from all of them. Gathered
they are whole on every rank, which is little beside the states of a training step, and any attention kernel takes them
as they are; passing them around in a ring would save that memory for one more kernel to write. Backwards, each rank has
gradients for all keys, and the sums over ranks go to whoever made them (a reduce-scatter, in fp32 or wider).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """This rank's place among the `size` ranks that share samples."""

    rank: int
    size: int
    group: dist.ProcessGroup | None

    def part(self, count: int) -> Tensor:
        """Return this rank's part of `count` > 0 things in a row, int64 ``[ceil(count / size)]``, for `gather`.

        All ranks have as many: beyond the end, the last one is repeated.
        """
        each = -(-count // self.size)
        return (torch.arange(each) + self.rank * each).clamp(max=count - 1)

    def mirrored(self, count: int) -> Tensor:
        """Return which rank has each of `count` things in a row, int64 ``[count]``; a rank may have none.

        Of 2 * size pieces it has one from the front and its mirror image from the back: where each one needs all before
        it, as in causal attention, ranks have equally much to do.
        """
        piece = torch.arange(count) * 2 * self.size // max(1, count)
        return torch.minimum(piece, 2 * self.size - 1 - piece)

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """Return all ranks' `rows` ``[n, ...]``, of which those of `part` are n on each, as ``[count, ...]``.

        Differentiable. A collective, forward and backward.
        """
        gathered: Tensor = _Gather.apply(self, rows)  # type: ignore[no-untyped-call]
        return gathered[:count]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sums of `values`, of any shape, over the ranks. A collective; takes no gradient."""
        total = values.detach().clone()
        dist.all_reduce(total, group=self.group)
        return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: Context, rows: Tensor) -> Tensor:
        ctx.context = context
        gathered = rows.new_empty(context.size * len(rows), *rows.shape[1:])
        dist.all_gather(list(gathered.chunk(context.size)), rows.contiguous(), group=context.group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        context: Context = ctx.context
        (grad,) = grads
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        summed = wide.new_empty(len(wide) // context.size, *wide.shape[1:])
        dist.reduce_scatter(summed, list(wide.chunk(context.size)), group=context.group)
        return None, summed.to(grad.dtype)


def distinct(index: Tensor) -> Tensor:
    """Return the distinct numbers in `index` ``[n]``, ascending."""
    found: Tensor = torch.unique(index)
    return found


def picked(rows: Tensor, index: Tensor, *, pin: bool) -> Tensor:
    """Return those of `rows` ``[batch, tokens, ...]``, flattened, that `index` names, as ``[1, n, ...]``.

    They are copied, with `pin` to pinned memory.
    """
    flat = rows.flatten(0, 1)
    copied = torch.empty(len(index), *flat.shape[1:], dtype=flat.dtype, pin_memory=pin)
    return torch.index_select(flat, 0, index, out=copied)[None]
