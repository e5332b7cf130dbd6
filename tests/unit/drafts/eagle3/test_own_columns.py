"""Own columns that are merged one by one give what one softmax over all scores gives, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from disagg_core.drafts.eagle3 import own_columns
from disagg_core.drafts.eagle3.own_columns import with_own_columns

pytestmark = pytest.mark.unit
ROWS, HEADS, KV_HEADS, DIM, KEYS = 6, 4, 2, 8, 5


def tensors(columns: int) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return {
        "query": [draw(ROWS, HEADS, DIM)],
        "keys": [draw(ROWS, KEYS, KV_HEADS, DIM)],
        "values": [draw(ROWS, KEYS, KV_HEADS, DIM)],
        "own_keys": [draw(ROWS, KV_HEADS, DIM) for _ in range(columns)],
        "own_values": [draw(ROWS, KV_HEADS, DIM) for _ in range(columns)],
    }


def attended(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of each row to keys of its own: result and logsumexp."""
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, dim=2) for x in (keys, values))
    scores = torch.einsum("nhd,nkhd->nhk", query, keys) / DIM**0.5
    return torch.einsum("nhk,nkhd->nhd", scores.softmax(-1), values), scores.logsumexp(-1)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("columns", [0, 1, 3])
def test_merged_columns_are_columns_of_the_softmax(
    columns: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_columns, "compiles", lambda device: compiled)
    given = tensors(columns)
    (query,), (keys,), (values,) = given["query"], given["keys"], given["values"]
    own_keys, own_values = given["own_keys"], given["own_values"]
    leaves = [query, keys, values, *own_keys, *own_values]

    all_keys = torch.cat([keys, *(own.unsqueeze(1) for own in own_keys)], dim=1)
    all_values = torch.cat([values, *(own.unsqueeze(1) for own in own_values)], dim=1)
    whole = attended(query, all_keys, all_values)[0]
    found = with_own_columns(*attended(query, keys, values), query, own_keys, own_values)

    torch.testing.assert_close(found, whole)
    weight = torch.linspace(-1, 1, whole.numel(), dtype=torch.float64).view_as(whole)
    theirs = torch.autograd.grad((found * weight).sum(), leaves)
    torch.testing.assert_close(theirs, torch.autograd.grad((whole * weight).sum(), leaves))
