"""Attention of the training-time test over packed samples, by PyTorch's FlexAttention.

The block of step-0 keys is one sequence of all samples' key rows. Its mask is causal within a document: a row sees the
keys from its sample's first one up to its own. The kernel skips the tiles that lie between samples: it costs what the
samples cost apart, and no sample's keys are padded to another's. The own keys of later test steps are merged in by
the logsumexp of the block, through which gradients go too.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask

from disagg_core.drafts.eagle3.batch import StepPlan
from disagg_core.drafts.eagle3.own_columns import with_own_columns
from disagg_core.drafts.flex import Range, flex_on, ranges_mask


class DocumentAttention:
    """The attention of all test steps of one batch; see `own_column_attention` for what it is given."""

    def __init__(self, plan: StepPlan) -> None:
        self._pattern = document_mask(plan)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, own_keys: Sequence[Tensor], own_values: Sequence[Tensor]
    ) -> Tensor:
        """Return the attention's result ``[rows, heads, head_dim]``; differentiable."""
        attend = flex_on(query.device)
        packed = (x.transpose(0, 1)[None] for x in (query, key, value))
        block, extra = attend(*packed, block_mask=self._pattern, enable_gqa=True, return_aux=AuxRequest(lse=True))
        output: Tensor = block[0].transpose(0, 1)  # [rows, heads, d]
        logsumexp: Tensor = extra.lse[0].transpose(0, 1)  # [rows, heads]
        return with_own_columns(output, logsumexp, query, own_keys, own_values)


def document_mask(plan: StepPlan) -> BlockMask:
    """Return the pattern of query rows by key rows: those of the row's own sample, up to its position."""
    first = plan.row_key - plan.row_positions  # a sample's key rows are its positions from 0 on
    return ranges_mask(plan.keys, Range(first, plan.row_key + 1))
