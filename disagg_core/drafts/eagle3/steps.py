"""The draft's part of the training-time test: L passes of the layer over the live rows.

The embedding half of queries, keys and values depends on the token alone, and test step k at position t works on token
t + k + 1: it is computed once per token and slides. Only the state half is computed at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from disagg_core.drafts.eagle3.attention import AttentionKernel, own_column_attention
from disagg_core.drafts.eagle3.batch import Eagle3Batch, StepPlan
from disagg_core.drafts.eagle3.flex import DocumentAttention
from disagg_core.drafts.eagle3.model import Eagle3Draft
from disagg_core.drafts.linear import linear
from disagg_core.drafts.rope import rotate


def run_steps(
    draft: Eagle3Draft, batch: Eagle3Batch, plan: StepPlan, kernel: AttentionKernel, *, checkpointing: bool
) -> list[Tensor]:
    """Return the state after each test step, before the final norm: L tensors ``[rows, H]``.

    Args:
        draft: the draft.
        batch: with hidden states on the draft's device.
        plan: its rows.
        kernel: of the attention.
        checkpointing: keep only the states and the own keys and values of a step, compute the rest again in the
            backward pass.
    """
    steps = _Steps(draft, batch, plan, kernel)
    state, key, value = steps.first_keys()
    own_keys: list[Tensor] = []
    own_values: list[Tensor] = []
    states = []
    for k in range(plan.ttt_length):
        arguments = (k, state, key, value, own_keys, own_values)
        if checkpointing:
            # Not the reentrant kind: it would lose the gradients of tensors that come inside a list.
            state, own_key, own_value = checkpoint(steps.step, *arguments, use_reentrant=False)
        else:
            state, own_key, own_value = steps.step(*arguments)
        states.append(state)
        if k:  # new lists: a step that is computed again must find those that it was called with
            own_keys, own_values = [*own_keys, own_key], [*own_values, own_value]
    return states


class _Steps:
    """What all steps of one batch share."""

    def __init__(self, draft: Eagle3Draft, batch: Eagle3Batch, plan: StepPlan, kernel: AttentionKernel) -> None:
        self._draft, self._plan = draft, plan
        self._attend: Callable[..., Tensor] = partial(own_column_attention, plan, kernel)
        if kernel == "flex":
            self._attend = DocumentAttention(plan)
        self._layer = draft.midlayer
        attention = self._layer.self_attn
        hidden = draft.config.hidden_size
        projections = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
        embedding_half, self._state_half = projections[:, :hidden].contiguous(), projections[:, hidden:].contiguous()
        self._dtype = projections.dtype
        self._query_width = attention.q_proj.out_features
        ids = torch.where(plan.token_inside, batch.input_ids.flatten()[plan.token_flat].long(), 0)
        embedded = F.embedding(ids, draft.embed_tokens.weight).to(self._dtype)
        self._sliding = linear(self._layer.input_layernorm(embedded), embedding_half)  # [token rows, q + k + v]
        self._aux = batch.aux_hidden_states.flatten(0, 1)
        self._tokens = batch.loss_mask.shape[1]

    def first_keys(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the input states of the query rows, and step-0 keys and values of all key rows."""
        plan, width = self._plan, self._query_width
        state = self._draft.project_aux(self._aux[plan.key_flat])
        normed = self._layer.hidden_norm(state)
        both = linear(normed, self._state_half[width:]) + self._sliding[:, width:][plan.key_token]
        key, value = self._heads(both).chunk(2, dim=1)
        cos, sin = self._draft.rotary(plan.key_positions, self._tokens, self._dtype)
        key = rotate(key, cos, sin)
        if plan.row_flat is None or plan.context is None:
            return state[plan.row_key], key, value.contiguous()
        both = plan.context.gather(torch.cat((key, value), dim=1), plan.keys)
        key, value = both.chunk(2, dim=1)
        return self._draft.project_aux(self._aux[plan.row_flat]), key.contiguous(), value.contiguous()

    def step(
        self, k: int, state: Tensor, key: Tensor, value: Tensor, own_keys: list[Tensor], own_values: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the next state ``[rows, H]`` and this step's own key and value (the block's, unused, for k = 0)."""
        plan, width = self._plan, self._query_width
        # The length grows with k for dynamic RoPE: in serving, every drafted token makes the sequence longer.
        cos, sin = self._draft.rotary(plan.row_positions + k, self._tokens + k, self._dtype)
        normed = self._layer.hidden_norm(state)
        token = plan.row_token + k
        if k == 0:
            query = self._heads(linear(normed, self._state_half[:width]) + self._sliding[:, :width][token])
            own_key, own_value = key, value
        else:
            projected = self._heads(linear(normed, self._state_half) + self._sliding[token])
            config = self._draft.config
            sizes = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
            query, own_key, own_value = torch.split(projected, sizes, dim=1)
            own_key = rotate(own_key, cos, sin)
            own_keys, own_values = [*own_keys, own_key], [*own_values, own_value]
        attended = self._attend(rotate(query, cos, sin), key, value, own_keys, own_values)
        return self._layer.finish(state, normed, attended.flatten(1)), own_key, own_value

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self._draft.config.head_dim)
