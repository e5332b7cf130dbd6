"""Stand-in for SGLang's compiled kernels on a machine without a GPU, for tests and demonstrations.

SGLang imports these names when it runs on a CPU. What a greedy chain of speculative decoding calls is here in plain
torch, for dense Llama and Qwen models, one request after the other (``--speculative-eagle-topk 1
--prefill-attention-backend intel_amx --decode-attention-backend intel_amx``); the rest exists by name only, and calling
it fails. Without speculation and with ``--attention-backend torch_native`` these models call nothing of this module.

Slots are rows of the key-value cache. ``req_to_token[r, t]`` is the slot of token t of the request in row r.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_QLEN_ONLY = 1
"""SGLang's `TreeMaskMode` on a CPU: masks among the drafted tokens only."""


def _absent(name: str) -> Any:
    def call(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name} was called, but this SGLang environment was built without kernels (setup.sh --cpu); "
            "use a dense Llama or Qwen model, or build the environment with --cuda on a machine with a GPU"
        )

    call.__name__ = call.__qualname__ = name
    return call


# For trees, and for drafts of several layers.
fill_accept_out_cache_loc_cpu = _absent("fill_accept_out_cache_loc_cpu")
rotate_input_ids_cpu = _absent("rotate_input_ids_cpu")


def _want_chain(name: str, *, chain: bool) -> None:
    if not chain:
        raise NotImplementedError(
            f"sgl_kernel.{name}: expected a chain (--speculative-eagle-topk 1), found a tree; this SGLang environment "
            "was built without kernels (setup.sh --cpu)"
        )


def copy_all_layer_kv_cache_cpu(_pointers: Tensor, _strides: Tensor, targets: Tensor, sources: Tensor) -> None:
    """Move tokens in the cache: from a slot to itself, which SGLang does once at the start. Others are for trees."""
    _want_chain("copy_all_layer_kv_cache_cpu", chain=torch.equal(targets, sources))


# --- slots -------------------------------------------------------------------------------------------------------


def _tokens(rows: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return row and number of the requests' tokens start … end - 1, one request's after the other's."""
    numbers = [torch.arange(start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    return rows.long().repeat_interleave((ends - starts).long()), torch.cat(numbers)


def assign_req_to_token_pool_cpu(
    rows: Tensor, req_to_token: Tensor, starts: Tensor, ends: Tensor, slots: Tensor, _pool_len: int
) -> None:
    """Note `slots` as those of the requests' tokens start … end - 1."""
    req_to_token[_tokens(rows, starts, ends)] = slots.to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(
    rows: Tensor, req_to_token: Tensor, starts: Tensor, ends: Tensor, slots: Tensor, _pool_len: int
) -> None:
    """Write the slots of the requests' tokens start … end - 1 to the front of `slots`."""
    found = req_to_token[_tokens(rows, starts, ends)]
    slots[: found.numel()] = found


def assign_draft_cache_locs_contiguous_cpu(
    rows: Tensor, req_to_token: Tensor, lengths: Tensor, slots: Tensor, pool_len: int, topk: int, steps: int
) -> None:
    """Write the slots of the `steps` tokens to be drafted after each request's `lengths` into `slots`."""
    _want_chain("assign_draft_cache_locs_contiguous_cpu", chain=topk == 1)
    assign_extend_cache_locs_cpu(rows, req_to_token, lengths, lengths + steps, slots, pool_len)


def build_draft_decode_metadata_cpu(
    req_to_token: Tensor, rows: Tensor, _lengths: Tensor, topk: int, _steps: int, _pool_len: int
) -> Tensor:
    """Return the slots of each candidate's tokens ``[requests, pool_len]``: a chain has one candidate per request."""
    _want_chain("build_draft_decode_metadata_cpu", chain=topk == 1)
    return req_to_token[rows]


# --- chains ------------------------------------------------------------------------------------------------------


def build_tree_kernel_efficient_cpu(
    _parents: Tensor,
    _selected: Tensor,
    lengths: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    next_token: Tensor,
    next_sibling: Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    mask_mode: int,
) -> None:
    """Lay out each request's chain: its last token and the `depth` drafted ones, each one the child of the one before.

    Args:
        lengths: [requests] tokens before the chain.
        tree_mask: [requests * n * n], whether token i of a chain sees token j; written.
        positions: [requests * n]; written.
        retrieve_index: [requests, n] places in the batch; written.
        next_token: [requests, n] first child's place in the chain, -1 for none; written.
        next_sibling: [requests, n]; stays -1, as it comes.
        topk: children of a token.
        depth: drafted tokens.
        draft_token_num: n.
        mask_mode: SGLang's `TreeMaskMode`.
    """
    _want_chain("build_tree_kernel_efficient_cpu", chain=topk == 1)
    if draft_token_num != depth + 1 or mask_mode != _QLEN_ONLY:
        raise NotImplementedError(
            f"sgl_kernel.build_tree_kernel_efficient_cpu: expected {depth + 1} tokens and mask mode {_QLEN_ONLY}, "
            f"found {draft_token_num} and {mask_mode}"
        )
    requests, places = lengths.numel(), torch.arange(draft_token_num)
    tree_mask.view(requests, draft_token_num, draft_token_num)[:] = places[:, None] >= places
    positions.view(requests, draft_token_num)[:] = lengths[:, None] + places
    retrieve_index[:] = torch.arange(requests * draft_token_num).view(requests, draft_token_num)
    next_token[:, :-1] = places[1:]
    next_token[:, -1] = -1


def verify_tree_greedy_cpu(
    *,
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Keep the drafted tokens that are the target's argmax, up to the first that is not.

    Args:
        predicts: [requests * n], the target's token after each kept one, by its place in the batch; written.
        accept_index: [requests, n] places of the last token and the kept ones, then -1 as it comes; written.
        accept_token_num: [requests] drafted tokens that are kept; written.
        candidates: [requests, n], the last token and the drafted ones.
        retrive_index: [requests, n] places in the batch (SGLang spells it so).
        retrive_next_token: [requests, n], not needed: the chain's order.
        retrive_next_sibling: [requests, n], all -1 in a chain.
        target_predict: [requests, n], the target's argmax after each token.
    """
    _want_chain("verify_tree_greedy_cpu", chain=bool((retrive_next_sibling == -1).all()))
    agreed = (candidates[:, 1:] == target_predict[:, :-1]).long().cumprod(dim=1)
    accept_token_num[:] = agreed.sum(dim=1)
    for request, kept in enumerate(accept_token_num.tolist()):
        places = retrive_index[request, : kept + 1]
        accept_index[request, : kept + 1] = places.to(accept_index.dtype)
        predicts[places] = target_predict[request, : kept + 1].to(predicts.dtype)


def fill_bonus_tokens_cpu(tokens: Tensor, counts: Tensor, last: Tensor, width: int) -> None:
    """Write the last of each request's `counts` tokens, ``tokens`` ``[requests * width]``, into `last` [requests]."""
    last[:] = tokens.view(-1, width).gather(1, counts.long()[:, None] - 1)[:, 0].to(last.dtype)


# --- attention (SGLang's intel_amx backend) -----------------------------------------------------------------------


def _attend(query: Tensor, keys: Tensor, values: Tensor, slots: Tensor, scaling: float, *, causal: bool) -> Tensor:
    """Return the attention's result ``[n, heads, head_dim]`` of a request's last n tokens over those at `slots`."""
    key, value = (cache[slots].to(query.dtype).movedim(0, 1) for cache in (keys, values))
    n, length = query.shape[0], slots.numel()
    seen = torch.ones(n, length, dtype=torch.bool).tril(length - n) if causal else None
    grouped = query.shape[1] != key.shape[0]
    attended = scaled_dot_product_attention(
        query.movedim(0, 1)[None], key[None], value[None], attn_mask=seen, scale=scaling, enable_gqa=grouped
    )
    return attended[0].movedim(0, 1)


def _refuse_variants(**found: Any) -> None:
    """Refuse what dense Llama and Qwen models have no use for."""
    plain = {"key_scale": 1.0, "value_scale": 1.0, "logit_cap": 0.0, "cross_attention": False, "sliding_window": 0}
    odd = {name: value for name, value in found.items() if value != plain.get(name)}
    if odd:
        raise NotImplementedError(
            f"sgl_kernel attention: expected none of {sorted(odd)}, found {odd}; this SGLang environment was built "
            "without kernels (setup.sh --cpu); use a dense Llama or Qwen model"
        )


def _extend_attention(
    query: Tensor,
    _key: Tensor,
    _value: Tensor,
    output: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: float,
    value_scale: float,
    req_to_token: Tensor,
    rows: Tensor,
    lengths: Tensor,
    new: Tensor,
    starts: Tensor,
    _longest: int,
    scaling: float,
    logit_cap: float,
    cross_attention: bool,
    sliding_window: int,
    encoder_lengths: Tensor | None,
    sinks: Tensor | None,
    tree_mask: Tensor | None,
    causal: bool,
) -> None:
    """Attention of each request's `new` last tokens, already in the cache, over all of its `lengths` tokens."""
    _refuse_variants(
        key_scale=key_scale,
        value_scale=value_scale,
        logit_cap=logit_cap,
        cross_attention=cross_attention,
        sliding_window=sliding_window,
        encoder_lengths=encoder_lengths,
        sinks=sinks,
        tree_mask=tree_mask,
    )
    for row, length, count, start in zip(*(x.tolist() for x in (rows, lengths, new, starts)), strict=True):
        mine = slice(start, start + count)
        slots = req_to_token[row, :length]
        output[mine] = _attend(query[mine], key_cache, value_cache, slots, scaling, causal=causal)


def _decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: float,
    value_scale: float,
    output: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    _workspace: Tensor,
    req_to_token: Tensor,
    rows: Tensor,
    lengths: Tensor,
    scaling: float,
    logit_cap: float,
    cross_attention: bool,
    sliding_window: int,
    encoder_lengths: Tensor | None,
    sinks: Tensor | None,
) -> None:
    """Put each request's new token into the cache at `slots` and attend from it over all of its `lengths` tokens."""
    _refuse_variants(
        key_scale=key_scale,
        value_scale=value_scale,
        logit_cap=logit_cap,
        cross_attention=cross_attention,
        sliding_window=sliding_window,
        encoder_lengths=encoder_lengths,
        sinks=sinks,
    )
    key_cache[slots] = key.view(-1, *key_cache.shape[1:]).to(key_cache.dtype)
    value_cache[slots] = value.view(-1, *value_cache.shape[1:]).to(value_cache.dtype)
    for request, (row, length) in enumerate(zip(rows.tolist(), lengths.tolist(), strict=True)):
        mine = slice(request, request + 1)
        output[mine] = _attend(query[mine], key_cache, value_cache, req_to_token[row, :length], scaling, causal=False)


# SGLang takes these two from torch's operator namespace. It takes nothing else of it as long as the operator that
# packs weights is not there.
torch.ops.sgl_kernel.extend_attention_cpu = _extend_attention
torch.ops.sgl_kernel.decode_attention_cpu = _decode_attention
