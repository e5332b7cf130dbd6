"""The fused passes over a vocabulary compute what torch does in several, for every size of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_core.drafts.dflash import dflash_loss
from disagg_core.drafts.dflash import slot_loss as slots
from disagg_core.drafts.dflash.options import BlockLossSection
from disagg_core.drafts.dflash.vocabulary import read, shaped, slope
from disagg_core.drafts.dflash2.loss import dflash2_loss
from tests.unit.drafts.dflash.cases import CAPPED, blocks_of, gradients, small_batch, small_draft, worst_gradient
from tests.unit.drafts.dflash2.cases import small_draft2

pytestmark = pytest.mark.unit

SHAPES = st.sampled_from([(1.0, None), (0.5, None), (0.5, 3.0)])


@settings(max_examples=60, deadline=None)
@given(
    vocabulary=st.integers(1, 1500),
    wanted=st.integers(1, 20),
    levels=st.sampled_from([3, 40, 10**6]),
    shape=SHAPES,
    seed=st.integers(0, 2**16),
)
def test_a_vocabulary_is_read_as_torch_reads_it(
    vocabulary: int, wanted: int, levels: int, shape: tuple[float, float | None], seed: int
) -> None:
    """With many ties, whose ids may differ but whose values may not."""
    generator = torch.Generator().manual_seed(seed)
    product = (torch.randint(-levels, levels, (5, vocabulary), generator=generator) * (4.0 / levels)).double()
    labels = torch.randint(vocabulary, (5,), generator=generator)
    weights = torch.rand(5, generator=generator, dtype=torch.float64)
    count = min(wanted, vocabulary)
    product.requires_grad_()
    logits = shaped(product, *shape)

    logsumexp, label_logit, predicted, values, ids = read(product.detach(), labels, count, *shape)

    torch.testing.assert_close(logsumexp, logits.detach().logsumexp(1))
    assert torch.equal(label_logit, logits.detach().gather(1, labels[:, None]).squeeze(1))
    assert torch.equal(logits.detach().gather(1, predicted[:, None]).squeeze(1), logits.detach().amax(1))
    assert torch.equal(values, logits.detach().topk(count).values)
    assert torch.equal(logits.detach().gather(1, ids), values)
    assert all(len(set(row)) == count for row in ids.tolist())
    cross_entropy = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    (expected,) = torch.autograd.grad((weights * cross_entropy).sum(), product)
    found = slope(product.detach(), labels, logsumexp, weights, *shape, torch.float64)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [{}, CAPPED, "dflash2"], ids=["plain", "capped", "dflash2"])
def test_the_fused_passes_give_the_loss_of_those_in_place(
    kind: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with labels that are no candidates."""
    draft = small_draft2() if kind == "dflash2" else small_draft(**kind)
    batch = small_batch(draft.config, [40, 33, 7], anchors=12)
    run: Any = dflash2_loss if kind == "dflash2" else dflash_loss
    expected = run(draft, batch, **blocks_of(batch), loss=BlockLossSection(type="dpace"))
    slopes = gradients(draft, expected.loss)
    monkeypatch.setattr(slots.flex, "compiles", lambda device: device.type == "cpu")
    if not compiled:
        monkeypatch.setattr(slots, "compiled", lambda function: function)
        monkeypatch.setattr(slots.flex, "compiled", lambda function: function)

    found = run(draft, batch, **blocks_of(batch), loss=BlockLossSection(type="dpace"), attention="gathered")

    torch.testing.assert_close(found.loss, expected.loss)
    assert worst_gradient(gradients(draft, found.loss), slopes) < 1e-5
