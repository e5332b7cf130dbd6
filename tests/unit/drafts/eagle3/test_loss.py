"""The training-time test against a plain eager one, against itself in other shapes, and against finite differences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from disagg_core.drafts.eagle3 import (
    Eagle3Batch,
    Eagle3Draft,
    Eagle3Loss,
    count_valid_positions,
    simulated_accept_length,
    training_time_test,
)
from disagg_core.drafts.eagle3.batch import shift_left, step_mask
from disagg_core.drafts.eagle3.options import LossSection
from disagg_core.errors import BadInput
from tests.benchmarks.baselines.eager_eagle3 import eager_training_time_test
from tests.unit.drafts.eagle3.cases import gradients, small_batch, small_draft, target_head, worst_gradient

pytestmark = pytest.mark.unit
LOSSES = ["soft_cross_entropy", "lk_alpha", "lk_lambda"]


def compare_with_eager(draft: Eagle3Draft, batch: dict[str, Tensor], **options: Any) -> None:
    """Losses, counts, rates and gradients of the eager formula, in fp64."""
    head = target_head(draft, torch.float64)
    expected = eager_training_time_test(draft, batch, lm_head=head, ttt_length=4, **options)
    expected_gradients = gradients(draft, expected.total)
    for attention in ("chunked", "flash"):
        found = training_time_test(draft, batch, lm_head=head, ttt_length=4, attention=attention, **options)
        torch.testing.assert_close(found.total, expected.total)
        torch.testing.assert_close(found.step_losses, expected.step_losses)
        torch.testing.assert_close(found.acceptance_rates, expected.acceptance_rates)
        assert found.correct.tolist() == expected.correct.tolist()
        assert found.denominators.tolist() == expected.denominators.tolist()
        assert worst_gradient(gradients(draft, found.total), expected_gradients) < 1e-9


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mask_mode", ["aligned", "compat"])
@pytest.mark.parametrize("normalisation", ["valid", "compat"])
def test_every_mode_is_the_plain_formula(loss: str, mask_mode: str, normalisation: str) -> None:
    draft = small_draft(dtype=torch.float64)
    batch = small_batch(draft, [12, 7], dtype=torch.float64)
    compare_with_eager(draft, batch, loss=loss, mask_mode=mask_mode, normalisation=normalisation)


@pytest.mark.parametrize(
    "changes",
    [
        {"draft_vocab_size": 40},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 10},
        {"hidden_size": 12, "target_hidden_size": 20},
        {"fc_norm": True},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
    ],
)
def test_every_shape_of_draft_is_the_plain_formula(changes: dict[str, Any]) -> None:
    draft = small_draft(dtype=torch.float64, **changes)
    compare_with_eager(draft, small_batch(draft, [12, 7], dtype=torch.float64), mask_mode="aligned")


def test_a_live_last_column_trains_on_the_uniform_teacher_in_compat_mode() -> None:
    draft = small_draft(dtype=torch.float64)
    draft.t2d[0] = True
    draft.d2t.copy_(draft.t2d.nonzero().flatten()[:24] - torch.arange(24))
    draft.t2d.zero_()[draft.d2t + torch.arange(24)] = True
    batch = small_batch(draft, [9], dtype=torch.float64)
    batch["loss_mask"][:, -1] = 1
    compare_with_eager(draft, batch, mask_mode="compat", normalisation="compat")


@st.composite
def masks(draw: st.DrawFn) -> tuple[list[list[int]], list[int]]:
    width = draw(st.integers(1, 12))
    rows = draw(st.integers(1, 3))
    bits = st.lists(st.integers(0, 1), min_size=width, max_size=width)
    return draw(st.lists(bits, min_size=rows, max_size=rows)), draw(
        st.lists(st.integers(1, width), min_size=rows, max_size=rows)
    )


@settings(max_examples=30, deadline=None)
@given(masks(), st.sampled_from(LOSSES), st.sampled_from(["aligned", "compat"]))
def test_any_masks_are_the_plain_formula(drawn: tuple[list[list[int]], list[int]], loss: str, mask_mode: str) -> None:
    """Empty samples, holes, live padding, single tokens: whatever rows are left out, nothing changes."""
    bits, lengths = drawn
    draft = small_draft(dtype=torch.float64)
    batch = small_batch(draft, lengths, width=len(bits[0]), dtype=torch.float64)
    batch["loss_mask"] = torch.tensor(bits)
    if mask_mode == "aligned":
        batch["loss_mask"] *= batch["attention_mask"]
    head = target_head(draft, torch.float64)
    options: dict[str, Any] = {"mask_mode": mask_mode, "normalisation": "valid"}
    found = training_time_test(draft, batch, lm_head=head, ttt_length=4, loss=loss, **options)
    expected = eager_training_time_test(draft, batch, lm_head=head, ttt_length=4, loss=loss, **options)
    assert found.denominators.tolist() == expected.denominators.tolist()
    assert found.correct.tolist() == expected.correct.tolist()
    assert int(count_valid_positions(batch, mask_mode)) == int(found.denominators[0])
    some = found.live > 0  # a plain LK lambda of no positions is not zero
    torch.testing.assert_close(found.step_losses[some], expected.step_losses[some])
    assert torch.isfinite(found.total)
    assert all(torch.isfinite(g).all() for g in gradients(draft, found.total).values())


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_agree_with_finite_differences(loss: str) -> None:
    draft = small_draft(dtype=torch.float64, hidden_size=8, intermediate_size=6, num_attention_heads=2, head_dim=4)
    batch = small_batch(draft, [6], dtype=torch.float64)
    batch["loss_mask"][:] = 1
    head = target_head(draft, torch.float64)

    def total() -> Tensor:
        return training_time_test(
            draft, batch, lm_head=head, ttt_length=3, loss=LossSection(type=loss, kl_scale=0.5, kl_decay=0)
        ).total

    found = gradients(draft, total())
    generator = torch.Generator().manual_seed(3)
    for name, parameter in draft.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-6)
            above = total()
            parameter.sub_(direction, alpha=2e-6)
            below = total()
            parameter.add_(direction, alpha=1e-6)
        numeric = float((above - below) / 2e-6)
        assert float((found[name] * direction).sum()) == pytest.approx(numeric, rel=1e-5, abs=1e-7), name


def acceptance_of_each_position(draft: Eagle3Draft, batch: dict[str, Tensor], logits: Tensor) -> list[Tensor]:
    """Return ``a_k(t)`` of the live positions of each step, from the logits of an ``aligned`` step."""
    mask = step_mask(batch["loss_mask"], batch["attention_mask"], "aligned")
    target = shift_left(batch["last_hidden_state"] @ target_head(draft, torch.float64).T, 1)
    full = target.softmax(-1)[..., draft.t2d]
    live = mask & draft.t2d[target.argmax(-1)]
    return [
        torch.minimum(shift_left(full, k), row.softmax(-1)).sum(-1)[shift_left(live, k)] for k, row in enumerate(logits)
    ]


@pytest.mark.parametrize("loss", LOSSES[1:])
def test_an_acceptance_loss_is_made_of_the_acceptance_of_each_position(loss: str) -> None:
    draft = small_draft(dtype=torch.float64)
    batch = small_batch(draft, [12, 7], dtype=torch.float64)
    options: dict[str, Any] = {"lm_head": target_head(draft, torch.float64), "ttt_length": 3}
    found = training_time_test(draft, batch, loss=loss, return_logits=True, **options)
    divergences = training_time_test(draft, batch, **options).step_losses
    assert found.logits is not None
    for k, accepted in enumerate(acceptance_of_each_position(draft, batch, found.logits)):
        rate = accepted.mean()
        torch.testing.assert_close(found.acceptance_rates[k], rate)
        weight = (-rate).exp()  # kl_scale and kl_decay are 1
        expected = {
            "lk_alpha": -accepted.log().mean(),  # more than -log of the mean
            "lk_lambda": weight * divergences[k] + (1 - weight) * (1 - rate),
        }
        torch.testing.assert_close(found.step_losses[k], expected[loss])


def test_positions_where_nothing_is_accepted_cost_a_bounded_amount() -> None:
    """Teacher and draft are certain, of different tokens: log 0 counts as the log of the smallest normal number."""
    draft = small_draft()
    with torch.no_grad():
        draft.norm.weight.mul_(1e5)
    batch = small_batch(draft, [12, 7])
    head = 1e5 * target_head(draft)
    output = training_time_test(draft, batch, lm_head=head, ttt_length=3, loss="lk_alpha")
    assert (output.acceptance_rates < 0.5).all()
    at_zero = -math.log(torch.finfo(torch.float32).tiny)
    torch.testing.assert_close(output.step_losses, (1 - output.acceptance_rates) * at_zero)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(draft, output.total).values())


def test_padding_and_bucketing_change_nothing() -> None:
    lengths = [5, 17, 9, 12]
    draft = small_draft()
    head = target_head(draft)
    whole = small_batch(draft, lengths)
    n = count_valid_positions(whole, "aligned")

    def run(batch: dict[str, Tensor]) -> Tensor:
        return training_time_test(draft, batch, lm_head=head, ttt_length=5, normaliser=n).total

    one_by_one = [
        {name: tensor[row : row + 1, :length] for name, tensor in whole.items()} for row, length in enumerate(lengths)
    ]
    expected = sum((run(batch) for batch in one_by_one), torch.zeros(()))
    expected_gradients = gradients(draft, expected)
    wide = small_batch(draft, lengths, width=40)
    buckets = [
        {name: tensor[rows, : max(lengths[r] for r in rows)] for name, tensor in whole.items()}
        for rows in ([0, 2], [3, 1])
    ]
    for batches in ([whole], [wide], buckets):
        total = sum((run(batch) for batch in batches), torch.zeros(()))
        torch.testing.assert_close(total, expected, atol=0, rtol=1e-6)
        assert worst_gradient(gradients(draft, total), expected_gradients) <= 1e-6


def test_garbage_in_the_padding_changes_nothing() -> None:
    draft = small_draft()
    batch = small_batch(draft, [6, 11])
    expected = training_time_test(draft, batch, lm_head=target_head(draft), ttt_length=4)
    padding = batch["attention_mask"] == 0
    batch["input_ids"][padding] = 39
    batch["loss_mask"][padding] = 1
    batch["aux_hidden_states"][padding] = 1e3
    batch["last_hidden_state"][padding] = -1e3
    found = training_time_test(draft, batch, lm_head=target_head(draft), ttt_length=4)
    torch.testing.assert_close(found.total, expected.total, atol=0, rtol=1e-6)
    assert torch.equal(found.denominators, expected.denominators)


def test_lk_terms_of_a_window_weigh_by_their_positions() -> None:
    draft = small_draft()
    batches = [small_batch(draft, [8], seed=1), small_batch(draft, [13], seed=2)]
    n = sum(count_valid_positions(batch, "aligned") for batch in batches)
    for batch in batches:
        share = count_valid_positions(batch, "aligned") / n
        options: dict[str, Any] = {"lm_head": target_head(draft), "ttt_length": 3, "loss": "lk_alpha"}
        alone = training_time_test(draft, batch, **options)
        inside = training_time_test(draft, batch, normaliser=n, **options)
        torch.testing.assert_close(inside.total, alone.total * share)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("attention", ["chunked", "flash"])
def test_small_slices_give_what_one_slice_gives(attention: str, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from disagg_core.drafts.eagle3 import attention as attention_module
    from disagg_core.drafts.eagle3 import lm_loss as loss_module

    draft = small_draft()
    batch = small_batch(draft, [60, 45])
    options: dict[str, Any] = {"lm_head": target_head(draft), "ttt_length": 5, "attention": attention, "loss": loss}
    one = training_time_test(draft, batch, **options)
    expected = gradients(draft, one.total)
    monkeypatch.setattr(attention_module, "_SCORE_BYTES", {"cpu": 1})
    monkeypatch.setattr(loss_module, "_SLICE_BYTES", {"cpu": 1})
    many = training_time_test(draft, batch, **options)
    torch.testing.assert_close(many.total, one.total, atol=0, rtol=1e-6)
    assert worst_gradient(gradients(draft, many.total), expected) < 1e-5


def test_checkpointing_changes_neither_loss_nor_gradients() -> None:
    draft = small_draft()
    batch = small_batch(draft, [12, 7])
    section = LossSection()
    plain = Eagle3Loss(draft, target_head(draft), section, 4)(batch)
    expected = gradients(draft, plain.total)
    again = Eagle3Loss(draft, target_head(draft), section, 4, activation_checkpointing=True)(batch)
    assert torch.equal(again.total, plain.total)
    assert worst_gradient(gradients(draft, again.total), expected) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_compiling_changes_neither_loss_nor_gradients(loss: str) -> None:
    draft = small_draft()
    batch = small_batch(draft, [12, 7])
    module = Eagle3Loss(draft, target_head(draft), LossSection(type=loss), 4)
    plain = module(batch)
    expected = gradients(draft, plain.total)
    module.compile(dynamic=True)
    compiled = module(batch)
    torch.testing.assert_close(compiled.total, plain.total, atol=0, rtol=1e-5)
    assert worst_gradient(gradients(draft, compiled.total), expected) < 1e-4


@pytest.mark.parametrize("attention", ["chunked", "flash"])
def test_bf16_stays_near_fp32(attention: str) -> None:
    draft, half = small_draft(), small_draft(dtype=torch.bfloat16)
    batch = small_batch(draft, [40, 33])
    options: dict[str, Any] = {"ttt_length": 5, "attention": attention}
    reference = training_time_test(draft, batch, lm_head=target_head(draft), **options)
    rounded = training_time_test(half, batch, lm_head=target_head(draft), **options)
    assert rounded.total.item() == pytest.approx(reference.total.item(), rel=0.02)
    expected, found = gradients(draft, reference.total), gradients(half, rounded.total)
    a, b = (torch.cat([g[name].flatten().float() for name in expected]) for g in (expected, found))
    assert float(torch.nn.functional.cosine_similarity(a, b, dim=0)) >= 0.99


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_module_trains_under_fsdp(one_rank: None, precision: torch.dtype) -> None:
    """fp32 masters take fp32 gradients; an empty share of a window gives zero gradients to every parameter."""
    draft = small_draft()
    batch = Eagle3Batch.of(small_batch(draft, [12, 7]))
    module = Eagle3Loss(draft, target_head(draft), LossSection(), 4)
    expected = gradients(draft, module(batch).total)
    draft.zero_grad()
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(module, mp_policy=policy, ignored_params=frozen)

    module(batch).total.backward()
    found = {n: p.grad.full_tensor() for n, p in draft.named_parameters()}
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    cosine = [torch.cosine_similarity(found[n].flatten(), expected[n].flatten(), dim=0) for n in expected]
    assert min(cosine) > 0.97

    module.zero_grad()
    empty = Eagle3Batch.of({**vars(batch), "loss_mask": torch.zeros_like(batch.loss_mask)})
    output = module(empty, normaliser=100)
    output.total.backward()
    assert output.total.item() == 0
    assert all(p.grad is not None and not p.grad.full_tensor().any() for p in draft.parameters())


def test_a_batch_that_does_not_fit_is_named() -> None:
    draft = small_draft()
    batch = small_batch(draft, [6])
    with pytest.raises(BadInput, match="missing: loss_mask"):
        Eagle3Batch.of({name: tensor for name, tensor in batch.items() if name != "loss_mask"})
    with pytest.raises(BadInput, match="attention_mask: expected 2 dimensions"):
        Eagle3Batch.of({**batch, "attention_mask": batch["attention_mask"][:, 1:]})
    with pytest.raises(BadInput, match=r"lm_head: expected \(40, 16\), found \(39, 16\)"):
        training_time_test(draft, batch, lm_head=target_head(draft)[1:], ttt_length=2)


def test_simulated_accept_length() -> None:
    assert simulated_accept_length([0.5, 0.5, 1.0]) == pytest.approx(1 + 0.5 + 0.25 + 0.25)
    assert simulated_accept_length(torch.zeros(3)) == 1.0
