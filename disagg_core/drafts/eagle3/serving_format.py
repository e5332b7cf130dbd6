"""Which tensors an EAGLE-3 draft consists of, by serving name, and the check that a set of tensors is one.

SGLang passes over names that it does not know without a word and starts with random weights in their place, so the
check is ours: every difference between tensors and config is listed at once, by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from disagg_core.errors import IncompatibleDraft

NUM_AUX = 3
"""Target layers whose outputs a draft reads."""


class DraftSizes(Protocol):
    """The part of a draft's config that fixes its tensors; the whole of what this module asks for."""

    @property
    def hidden_size(self) -> int:
        """Width H of the draft."""

    @property
    def target_hidden_size(self) -> int:
        """Width H_t of the target."""

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP."""

    @property
    def num_attention_heads(self) -> int:
        """Query heads."""

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""

    @property
    def vocab_size(self) -> int:
        """The target's vocabulary V."""

    @property
    def draft_vocab_size(self) -> int:
        """The draft's vocabulary K."""

    @property
    def fc_norm(self) -> bool:
        """Whether each third of the aux states is normed before fc."""

    @property
    def owns_embedding(self) -> bool:
        """Whether the embedding is the draft's own, because the target's has another width."""


def expected_shapes(sizes: DraftSizes) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a draft, by serving name.

    The embedding is the target's and no part of the draft, unless the widths differ.
    """
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    query = sizes.num_attention_heads * sizes.head_dim
    shared = sizes.num_key_value_heads * sizes.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, NUM_AUX * sizes.target_hidden_size),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "midlayer.self_attn.q_proj.weight": (query, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (shared, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (shared, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, query),
        "midlayer.mlp.gate_proj.weight": (inner, hidden),
        "midlayer.mlp.up_proj.weight": (inner, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, inner),
        "norm.weight": (hidden,),
        "lm_head.weight": (sizes.draft_vocab_size, hidden),
        "d2t": (sizes.draft_vocab_size,),
        "t2d": (sizes.vocab_size,),
    }
    if sizes.owns_embedding:
        shapes["embed_tokens.weight"] = (sizes.vocab_size, hidden)
    if sizes.fc_norm:
        shapes |= {f"fc_norm.{third}.weight": (sizes.target_hidden_size,) for third in range(NUM_AUX)}
    return shapes


def check_tensors(tensors: Mapping[str, Tensor], sizes: DraftSizes, source: str) -> None:
    """Check that `tensors` are exactly a draft of these `sizes`: names, shapes, dtypes, finite, one vocabulary map.

    Raises:
        IncompatibleDraft: with every unknown, missing, misshapen, ill-typed or non-finite tensor named.
    """
    expected = expected_shapes(sizes)
    faults = [f"unknown tensor {name} {list(tensors[name].shape)}" for name in sorted(set(tensors) - set(expected))]
    faults += [f"missing tensor {name} {list(expected[name])}" for name in sorted(set(expected) - set(tensors))]
    for name in sorted(set(expected) & set(tensors)):
        faults += _faults_of(name, tensors[name], expected[name])
    if not faults:
        faults = list(_vocabulary_faults(tensors["d2t"], tensors["t2d"]))
    if faults:
        raise IncompatibleDraft(f"{source}: tensors and config do not fit: " + "; ".join(faults))


def _faults_of(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Iterable[str]:
    if tuple(tensor.shape) != shape:
        yield f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}"
    if name in ("d2t", "t2d"):
        dtype = torch.int64 if name == "d2t" else torch.bool
        if tensor.dtype != dtype:
            yield f"{name}: expected {dtype}, found {tensor.dtype}"
    elif not tensor.is_floating_point():
        yield f"{name}: expected a floating-point dtype, found {tensor.dtype}"
    elif not torch.isfinite(tensor).all():
        yield f"{name}: has values that are not finite"


def _vocabulary_faults(d2t: Tensor, t2d: Tensor) -> Iterable[str]:
    kept = t2d.nonzero().flatten()
    if kept.numel() != d2t.numel():
        yield f"t2d: expected {d2t.numel()} target ids (the length of d2t), found {kept.numel()}"
    elif not torch.equal(torch.arange(d2t.numel(), device=d2t.device) + d2t, kept):
        yield "d2t: does not name the target ids that t2d keeps, in ascending order"
