"""Each position's own keys of later test steps: one more column of scores for every row, merged in or differentiated.

A column is merged by the logsumexp of what was merged before it. On CUDA both directions are compiled, whatever the run
document says of compiling: eagerly, the many passes over ``[rows, heads, head_dim]`` take as long as a quarter of the
step's products (measured on an H200), fused they read and write each tensor once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from disagg_core.drafts.flex import compiles


def merged_columns(
    block: Tensor, logsumexp: Tensor, query: Tensor, own_keys: Sequence[Tensor], own_values: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the attention's result ``[rows, heads, d]`` over block and own columns, and its logsumexp; no gradients.

    Args:
        block: the result over the block alone, ``[rows, heads, d]``.
        logsumexp: of the block's scores, ``[rows, heads]`` in the dtype to compute in.
        query: ``[rows, heads, d]``, rotated.
        own_keys: one for each column, ``[rows, kv_heads, d]``, rotated.
        own_values: likewise, not rotated.
    """
    merge = _on(query.device)[0]
    output = block.to(logsumexp.dtype) if own_keys else block
    for own_key, own_value in zip(own_keys, own_values, strict=True):
        output, logsumexp = merge(output, logsumexp, query, own_key, own_value)
    return output.to(query.dtype).contiguous(), logsumexp


def column_gradients(
    query: Tensor,
    grad_output: Tensor,
    inner: Tensor,
    logsumexp: Tensor,
    own_keys: Sequence[Tensor],
    own_values: Sequence[Tensor],
    grad_query: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """Return `grad_query` with the own columns' part added, and the gradients of own keys, then own values.

    Args:
        query: ``[rows, heads, d]``, rotated.
        grad_output: of the attention's result, ``[rows, heads, d]``.
        inner: its product with the result, ``[rows, heads]``.
        logsumexp: of all scores, ``[rows, heads]``.
        own_keys: see `merged_columns`; so `own_values`.
        grad_query: what is known of it, ``[rows, heads, d]``.
    """
    differentiate = _on(query.device)[1]
    total = grad_query.to(logsumexp.dtype) if own_keys else grad_query
    by_key, by_value = [], []
    for own_key, own_value in zip(own_keys, own_values, strict=True):
        total, grad_key, grad_value = differentiate(query, grad_output, inner, logsumexp, own_key, own_value, total)
        by_key.append(grad_key)
        by_value.append(grad_value)
    return total.to(query.dtype), by_key + by_value


def with_own_columns(
    block: Tensor, logsumexp: Tensor, query: Tensor, own_keys: Sequence[Tensor], own_values: Sequence[Tensor]
) -> Tensor:
    """Return what `merged_columns` does of the result; differentiable, by the block's result and logsumexp too."""
    result: Tensor = _WithOwn.apply(block, logsumexp, query, *own_keys, *own_values)  # type: ignore[no-untyped-call]
    return result


class _WithOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: Tensor, logsumexp: Tensor, query: Tensor, *own: Tensor) -> Tensor:
        half = len(own) // 2
        output, whole = merged_columns(block, logsumexp, query, own[:half], own[half:])
        ctx.save_for_backward(block, logsumexp, query, output, whole, *own)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        block, logsumexp, query, output, whole, *own = ctx.saved_tensors
        half, grad_output = len(own) // 2, grads[0].contiguous()
        inner = (grad_output * output).sum(-1).to(whole.dtype)
        weight = (logsumexp - whole).exp()
        by_block = grad_output * weight.unsqueeze(-1).to(grad_output.dtype)
        by_logsumexp = weight * ((grad_output * block).sum(-1).to(whole.dtype) - inner)
        none = torch.zeros_like(query)
        by_query, by_own = column_gradients(query, grad_output, inner, whole, own[:half], own[half:], none)
        return by_block, by_logsumexp, by_query, *by_own


def _merge(
    output: Tensor, logsumexp: Tensor, query: Tensor, own_key: Tensor, own_value: Tensor
) -> tuple[Tensor, Tensor]:
    work, kv_heads = logsumexp.dtype, own_key.shape[1]
    scores = (_grouped(query, kv_heads, work) * own_key.to(work).unsqueeze(2)).sum(-1).flatten(1)
    scores = scores / math.sqrt(query.shape[2])
    whole = torch.logaddexp(logsumexp, scores)
    weight = torch.unflatten((scores - whole).exp(), 1, (kv_heads, -1)).unsqueeze(-1)
    added = (weight * own_value.to(work).unsqueeze(2)).flatten(1, 2)
    return output * (logsumexp - whole).exp().unsqueeze(-1) + added, whole


def _differentiate(
    query: Tensor,
    grad_output: Tensor,
    inner: Tensor,
    logsumexp: Tensor,
    own_key: Tensor,
    own_value: Tensor,
    grad_query: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    work, kv_heads, scale = logsumexp.dtype, own_key.shape[1], 1.0 / math.sqrt(query.shape[2])
    queries, grads = _grouped(query, kv_heads, work), _grouped(grad_output, kv_heads, work)
    key, value = own_key.to(work).unsqueeze(2), own_value.to(work).unsqueeze(2)
    limits, inners = (torch.unflatten(x, 1, (kv_heads, -1)) for x in (logsumexp, inner))
    weight = ((queries * key).sum(-1) * scale - limits).exp()
    slope = (weight * ((grads * value).sum(-1) - inners) * scale).unsqueeze(-1)
    by_key = (slope * queries).sum(2).to(own_key.dtype)
    by_value = (weight.unsqueeze(-1) * grads).sum(2).to(own_value.dtype)
    return grad_query + (slope * key).flatten(1, 2), by_key, by_value


def _grouped(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """Return ``[n, heads, d]`` as ``[n, kv_heads, group, d]``."""
    return torch.unflatten(x.to(dtype), 1, (kv_heads, -1))


def _on(device: torch.device) -> tuple[Callable[..., tuple[Tensor, ...]], ...]:
    return _compiled() if compiles(device) else (_merge, _differentiate)


@cache
def _compiled() -> tuple[Callable[..., tuple[Tensor, ...]], ...]:
    # Not `dynamic=True`: sizes of heads would be no constants either, and kernels divide by them for every number.
    return torch.compile(_merge), torch.compile(_differentiate)
