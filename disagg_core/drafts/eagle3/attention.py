"""Attention of the training-time test: a causal block of step-0 keys and each position's own later keys.

The scores of test step k at position t are those of the step-0 keys up to t and of the position's own keys of steps
1 .. k, under one softmax. The block is causal and the same in shape for every step; the own terms are k more scores per
row. No kernel writes a ``T x (T + k)`` matrix:

- `chunked` (any device and dtype) walks over query rows, a slice of scores at a time, and computes the slice again in
  the backward pass from the saved logsumexp. Rows that no step needs are not there at all.
- `flash` (one sample after the other has the same number of key rows) runs the device's flash kernel on the block and
  merges the own terms by their logsumexp. Its backward pass is the flash kernel's own, given the **merged** output and
  logsumexp: the gradient of a softmax needs nothing else (https://arxiv.org/abs/2205.14135, algorithm 4).
- `flex` (packed samples on CUDA) is `disagg_core.drafts.eagle3.flex`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from disagg_core.drafts.eagle3.batch import StepPlan
from disagg_core.drafts.eagle3.own_columns import column_gradients, merged_columns
from disagg_core.drafts.linear import outer, product

AttentionKernel = Literal["chunked", "flash", "flex"]

_SCORE_BYTES = {"cpu": 1 * 1024**2, "cuda": 256 * 1024**2}
"""Bytes of one slice of scores: on CPU about what a core's cache holds."""
_SLICE_ROWS = 128
"""Rows of a slice at most: a slice computes every key that its last row sees for all its rows."""
_EMPTY = -1e30
"""Stands for the largest score of a row that may attend to nothing."""


def own_column_attention(
    plan: StepPlan,
    kernel: AttentionKernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    own_keys: Sequence[Tensor],
    own_values: Sequence[Tensor],
) -> Tensor:
    """Return the attention's result ``[rows, heads, head_dim]``; differentiable.

    Args:
        plan: rows and their bounds.
        kernel: ``chunked`` or ``flash``, which needs a dense plan without padding among the keys that live rows see.
        query: ``[rows, heads, head_dim]``, rotated.
        key: ``[key rows, kv_heads, head_dim]`` of step 0, rotated.
        value: ``[key rows, kv_heads, head_dim]`` of step 0.
        own_keys: of steps 1 .. k, each ``[rows, kv_heads, head_dim]``, rotated.
        own_values: likewise, not rotated.
    """
    function = _Flash if kernel == "flash" else _Chunked
    result: Tensor = function.apply(plan, query, key, value, *own_keys, *own_values)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class _Slice:
    """Query rows `rows` of one sample, which see the key rows `keys` (the last ones partly)."""

    rows: slice
    keys: slice
    open_keys: int  # so many of the keys are seen by every row of the slice

    def queries(self, group: int) -> slice:
        """The slice's rows where each row stands `group` times."""
        return slice(self.rows.start * group, self.rows.stop * group)


def _slices(plan: StepPlan, group: int, device: str) -> Iterator[_Slice]:
    """Cut the query rows so that a slice's scores for one key head, `group` query heads, keep to the budget."""
    row, first_key = 0, 0
    for bounds, keys in zip(plan.row_bounds, plan.key_counts, strict=True):
        at = 0
        while at < len(bounds):
            per_row = 4 * group * min(keys, bounds[at] + _SLICE_ROWS)
            end = min(len(bounds), at + min(_SLICE_ROWS, max(16, _SCORE_BYTES[device] // per_row)))
            yield _Slice(
                slice(row + at, row + end), slice(first_key, first_key + bounds[end - 1] + 1), open_keys=bounds[at]
            )
            at = end
        row += len(bounds)
        first_key += keys


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """Turn ``[n, heads, d]`` into ``[kv_heads, n * group, d]``, contiguous."""
    n, heads, dim = x.shape
    return x.view(n, kv_heads, heads // kv_heads, dim).transpose(0, 1).reshape(kv_heads, -1, dim)


def _by_row(x: Tensor, rows: int) -> Tensor:
    """Turn ``[kv_heads, n * group, d]`` back into ``[n, heads, d]``."""
    kv_heads, _, dim = x.shape
    return x.view(kv_heads, rows, -1, dim).transpose(0, 1).reshape(rows, -1, dim)


def _mask(plan: StepPlan, piece: _Slice, scores: Tensor) -> None:
    """Exclude later and padded keys from `scores` ``[n * group, keys]`` in place."""
    positions = plan.row_positions[piece.rows]
    late = torch.arange(piece.open_keys, scores.shape[-1], device=scores.device) > positions[:, None]
    by_row = scores.view(positions.numel(), -1, scores.shape[-1])
    by_row[..., piece.open_keys :].masked_fill_(late[:, None, :], -math.inf)
    if plan.key_padding is not None:
        scores.masked_fill_(plan.key_padding[piece.keys], -math.inf)


def _own_scores(query: Tensor, own_key: Tensor, scale: float) -> Tensor:
    """Return ``[n, heads]`` scores of each row's query ``[n, heads, d]`` against its own key ``[n, kv_heads, d]``."""
    n, heads, dim = query.shape
    grouped = query.view(n, own_key.shape[1], -1, dim)
    return (grouped * own_key.unsqueeze(2)).sum(-1).view(n, heads) * scale


def _spread(x: Tensor, heads: int) -> Tensor:
    """Repeat ``[n, kv_heads, d]`` for the query heads of each group: ``[n, heads, d]``."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _gathered(x: Tensor, kv_heads: int) -> Tensor:
    """Sum ``[n, heads, d]`` over the query heads of each group: ``[n, kv_heads, d]``."""
    return x.view(x.shape[0], kv_heads, -1, x.shape[2]).sum(2)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: StepPlan, query: Tensor, key: Tensor, value: Tensor, *own: Tensor) -> Tensor:
        kv_heads, scale = key.shape[1], 1.0 / math.sqrt(query.shape[2])
        work = torch.float64 if query.dtype == torch.float64 else torch.float32
        heads, rows = query.shape[1], query.shape[0]
        scaled, keys, values = (
            _by_kv_head(query * scale, kv_heads),
            _by_kv_head(key, kv_heads),
            _by_kv_head(value, kv_heads),
        )
        block = torch.empty_like(scaled)
        top = scaled.new_empty(kv_heads, rows * (heads // kv_heads), 1, dtype=work)
        total = torch.empty_like(top)
        for piece in _slices(plan, heads // kv_heads, query.device.type):
            for head in range(kv_heads):
                at = piece.queries(heads // kv_heads)
                scores = product(scaled[head, at], keys[head, piece.keys].t()).to(work)
                _mask(plan, piece, scores)
                # Without the clamp a row that sees no key would subtract -inf from -inf, which is NaN.
                largest = scores.amax(-1, keepdim=True).clamp_(min=_EMPTY)
                weights = scores.sub_(largest).exp_()
                top[head, at], total[head, at] = largest, weights.sum(-1, keepdim=True)
                block[head, at] = product(weights.to(query.dtype), values[head, piece.keys])
        sums, largest = _by_row(total, rows), _by_row(top, rows)  # [rows, heads, 1]
        output = _by_row(block, rows)
        own_keys, own_values = own[: len(own) // 2], own[len(own) // 2 :]
        own_scores = [_own_scores(query, k, scale).to(work).unsqueeze(-1) for k in own_keys]
        # The block was summed under its own largest score; an own score may be so much larger that its weight under
        # that one would overflow. So both sides move to the largest of all.
        highest = torch.stack([largest, *own_scores]).amax(0)
        fade = (largest - highest).exp()
        sums, output = sums * fade, output * fade.to(query.dtype)
        for score, own_value in zip(own_scores, own_values, strict=True):
            weight = (score - highest).exp()
            sums += weight
            output += weight.to(query.dtype) * _spread(own_value, heads)
        sums = sums.clamp_(min=torch.finfo(work).tiny)  # a row that sees nothing gives 0, not 0 / 0
        output /= sums.to(query.dtype)
        logsumexp = (highest + sums.log()).squeeze(-1)
        ctx.plan, ctx.scale = plan, scale
        ctx.save_for_backward(query, key, value, output, logsumexp, *own)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, scale = ctx.plan, ctx.scale
        query, key, value, output, logsumexp, *own = ctx.saved_tensors
        (grad_output,) = grads
        kv_heads, work = key.shape[1], logsumexp.dtype
        group, rows = query.shape[1] // kv_heads, query.shape[0]
        # All that the slope of one score needs of the other scores. `output` is over block and own columns together, so
        # this one number serves both.
        inner = (grad_output * output).sum(-1).to(work)  # [rows, heads]
        plain, grad, keys, values = (_by_kv_head(x, kv_heads) for x in (query, grad_output, key, value))
        limits, inners = (_by_kv_head(x.unsqueeze(-1), kv_heads) for x in (logsumexp, inner))
        by_query, by_key, by_value = torch.empty_like(plain), torch.zeros_like(keys), torch.zeros_like(values)
        for piece in _slices(plan, group, query.device.type):
            for head in range(kv_heads):
                at, seen = piece.queries(group), piece.keys
                scores = product(plain[head, at], keys[head, seen].t()).to(work).mul_(scale)
                _mask(plan, piece, scores)
                weights = scores.sub_(limits[head, at]).exp_()
                by_value[head, seen] += outer(weights.to(query.dtype), grad[head, at])
                slope = product(grad[head, at], values[head, seen].t()).to(work)
                slope = slope.sub_(inners[head, at]).mul_(weights).mul_(scale).to(query.dtype)
                by_query[head, at] = product(slope, keys[head, seen])
                by_key[head, seen] += outer(slope, plain[head, at])
        grad_query = _by_row(by_query, rows)
        half = len(own) // 2
        grad_query, own_grads = column_gradients(
            query, grad_output, inner, logsumexp, own[:half], own[half:], grad_query
        )
        return None, grad_query, by_key.transpose(0, 1), by_value.transpose(0, 1), *own_grads


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: StepPlan, query: Tensor, key: Tensor, value: Tensor, *own: Tensor) -> Tensor:
        scale, half = 1.0 / math.sqrt(query.shape[2]), len(own) // 2
        dense_query = _to_dense(plan, query)
        block, logsumexp, extra = _flash_forward(dense_query, *_dense_keys(plan, key, value, query.shape[1]), scale)
        found = (_to_rows(plan, block), _to_rows(plan, logsumexp))
        output, logsumexp = merged_columns(*found, query, own[:half], own[half:])
        ctx.plan, ctx.scale, ctx.extra = plan, scale, extra
        ctx.save_for_backward(query, key, value, output, logsumexp, *own)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, scale = ctx.plan, ctx.scale
        query, key, value, output, logsumexp, *own = ctx.saved_tensors
        grad_output = grads[0].contiguous()
        heads, kv_heads, half = query.shape[1], key.shape[1], len(own) // 2
        dense = [_to_dense(plan, x) for x in (grad_output, query, output)]
        # The grid's other rows get a logsumexp of 0, which is not theirs; their gradient is 0, and so is what they add.
        dense_logsumexp = _to_dense(plan, logsumexp.unsqueeze(-1)).squeeze(-1)
        keys = _dense_keys(plan, key, value, heads)
        found = _flash_backward(dense[0], dense[1], *keys, dense[2], dense_logsumexp.contiguous(), ctx.extra, scale)
        grad_key, grad_value = (_gathered(x.transpose(1, 2).flatten(0, 1), kv_heads) for x in found[1:])
        inner = (grad_output * output).sum(-1).to(logsumexp.dtype)
        by_block = _to_rows(plan, found[0])
        grad_query, by_own = column_gradients(query, grad_output, inner, logsumexp, own[:half], own[half:], by_block)
        return None, grad_query.contiguous(), grad_key, grad_value, *by_own


def _to_dense(plan: StepPlan, x: Tensor) -> Tensor:
    """Put query rows ``[rows, heads, d]`` on the dense grid, zero elsewhere: ``[batch, heads, keys, d]``."""
    grid = x
    if plan.rows != plan.keys:
        grid = x.new_zeros(plan.keys, *x.shape[1:]).index_copy(0, plan.row_key, x)
    return grid.view(len(plan.key_counts), -1, *x.shape[1:]).transpose(1, 2)


def _to_rows(plan: StepPlan, x: Tensor) -> Tensor:
    """Return the query rows ``[rows, heads, ...]`` of the dense grid ``[batch, heads, keys, ...]``."""
    grid = x.transpose(1, 2).flatten(0, 1)
    return grid if plan.rows == plan.keys else grid[plan.row_key]


def _dense_keys(plan: StepPlan, key: Tensor, value: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return key and value rows as ``[batch, heads, keys, d]``; the CUDA kernel takes the fewer heads as they are."""
    batch = len(plan.key_counts)
    if key.device.type != "cuda":
        key, value = _spread(key, heads), _spread(value, heads)
    return (
        key.view(batch, -1, *key.shape[1:]).transpose(1, 2),
        value.view(batch, -1, *value.shape[1:]).transpose(1, 2),
    )


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Run the device's causal flash kernel; return output, logsumexp and what its backward pass wants besides."""
    if query.device.type == "cuda":
        output, logsumexp, *extra, _ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, True, False, scale=scale
        )
        return output, logsumexp, tuple(extra)
    output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, True, scale=scale
    )
    return output, logsumexp, ()


def _flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    extra: tuple[Any, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    if query.device.type == "cuda":
        cum_q, cum_k, max_q, max_k, seed, offset = extra
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, output, logsumexp, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset, scale=scale
        )
        return found
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, output, logsumexp, 0.0, True, scale=scale
    )
    return grads
