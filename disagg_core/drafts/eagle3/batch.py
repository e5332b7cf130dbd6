"""What a training step is given, and which of its rows have work to do.

Everything is unshifted on the way in; the shifts of the method are made here. Position u of the shifted sequence
belongs to token u + 1: it has that token's embedding and target logits, and its logits predict token u + 2. Test step k
at position t works on u = t + k, so teacher and mask depend on u alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from disagg_core.drafts.context import Context, distinct
from disagg_core.drafts.layout import Layout
from disagg_core.drafts.upload import uploaded
from disagg_core.errors import BadInput

MaskMode = Literal["aligned", "compat"]


@dataclass(frozen=True)
class Eagle3Batch:
    """A batch of captured samples, unshifted: right-padded, or with ids and states packed in one row.

    Keep the two masks in host memory, also for a draft on a GPU: the step then knows its live rows without a device
    synchronisation. `to` does so. With masks on the GPU every row is computed.
    """

    input_ids: Tensor  # [batch, tokens] integer, packed [1, tokens of all]; so are the states
    attention_mask: Tensor  # [batch, tokens] integer or bool, 1 where a token stands
    loss_mask: Tensor  # [batch, tokens] integer or bool, 1 where the token is trained on
    aux_hidden_states: Tensor  # [batch, tokens, 3 * target_hidden], low layer to high
    last_hidden_state: Tensor  # [batch, tokens, target_hidden], after the target's final norm
    packing: Layout | None = None  # where a packed batch has its samples
    shared: StepPlan | None = None
    """The plan of a rank that shares the batch with others, in host memory: ids and states are those that it names."""

    @property
    def layout(self) -> Layout:
        """Where its samples lie; on the device of the masks."""
        return self.packing or Layout.like(self.loss_mask)

    @classmethod
    def of(cls, tensors: Eagle3Batch | Mapping[str, Tensor]) -> Eagle3Batch:
        """Return `tensors` as a checked batch.

        Raises:
            BadInput: a tensor is missing or the shapes do not fit each other.
        """
        if isinstance(tensors, Eagle3Batch) and tensors.shared is not None:
            return tensors
        names = [field.name for field in fields(cls) if field.name not in ("packing", "shared")]
        if isinstance(tensors, Mapping):
            missing = [name for name in names if name not in tensors]
            if missing:
                raise BadInput(f"batch: expected {', '.join(names)}; missing: {', '.join(missing)}")
            given: dict[str, Any] = {name: tensors[name] for name in names}
            tensors = cls(**given)
        for name in names:
            tensor: Tensor = getattr(tensors, name)
            shape = (tensors.loss_mask if name.endswith("mask") else tensors.input_ids).shape
            if tensors.packing is None:
                shape = tensors.input_ids.shape
            expected_dims = 3 if name.endswith(("states", "state")) else 2
            if tensor.shape[:2] != shape or tensor.dim() != expected_dims:
                raise BadInput(
                    f"batch: {name}: expected {expected_dims} dimensions starting with {list(shape)}, "
                    f"found {list(tensor.shape)}"
                )
        return tensors

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Eagle3Batch:
        """Move the tensors that are computed with to `device`; the masks stay where they are."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            aux_hidden_states=self.aux_hidden_states.to(device, non_blocking=non_blocking),
            last_hidden_state=self.last_hidden_state.to(device, non_blocking=non_blocking),
        )

    def moved(self) -> tuple[Tensor, ...]:
        """Return states and ids."""
        return self.input_ids, self.aux_hidden_states, self.last_hidden_state


def shift_left(x: Tensor, by: int) -> Tensor:
    """Return `x` ``[batch, tokens, ...]`` shifted left by `by` tokens, filled with zeros."""
    shifted = torch.zeros_like(x)
    if by < x.shape[1]:
        shifted[:, : x.shape[1] - by] = x[:, by:]
    return shifted


def step_mask(loss_mask: Tensor, attention_mask: Tensor, mask_mode: MaskMode) -> Tensor:
    """Return the loss mask of test step 0, bool ``[batch, tokens]``; step k's is this one shifted left by k.

    ``aligned``: position u is live when the token that it predicts (u + 2) is trained on and neither that token nor the
    one its teacher comes from (u + 1) is padding or beyond the end. ``compat``: the mask as it came, not shifted.
    """
    if mask_mode == "compat":
        return loss_mask != 0
    real = attention_mask != 0
    return shift_left((loss_mask != 0) & real, 2) & shift_left(real, 1)


def count_valid_positions(batch: Eagle3Batch | Mapping[str, Tensor], mask_mode: MaskMode) -> Tensor:
    """Return the number of live positions of test step 0, int64 scalar: the batch's share of N in ``valid`` mode."""
    batch = Eagle3Batch.of(batch)
    return step_mask(batch.loss_mask, batch.attention_mask, mask_mode).sum()


@dataclass(frozen=True)
class StepPlan:
    """The rows of one training step, packed without padding.

    A *key row* is a position whose step-0 key is attended to; they are the positions before `key_counts[b]` of each
    sample b, one sample after the other. A *query row* is a position that some test step of the batch needs: at least
    one of its `ttt_length` teachers is live. A *teacher row* is a live position u. Index tensors are int64 on the
    draft's device.
    """

    ttt_length: int
    key_counts: tuple[int, ...]
    key_flat: Tensor  # [key rows] index into the batch's tokens, flattened over its rows
    key_positions: Tensor  # [key rows] t
    key_padding: Tensor | None  # [key rows] bool, True where the key must not be attended to
    row_key: Tensor  # [rows] index into all key rows
    row_token: Tensor  # [rows] index into the token rows for step 0; step k is k further
    row_flat: Tensor | None  # [rows] index, as of keys, of t; None where every row is among the key rows of this rank
    row_positions: Tensor  # [rows] t
    row_bounds: tuple[Sequence[int], ...]  # t of the query rows of each sample, in host memory
    token_flat: Tensor  # [token rows] index, as of keys, of token u + 1, for u < key_counts[b] + L - 1
    token_inside: Tensor  # [token rows] bool, False where u + 1 is beyond the end (embedding of id 0)
    key_token: Tensor  # [key rows] index into the token rows for step 0
    teacher_flat: Tensor  # [teacher rows] index, as of keys, of token u + 1
    teacher_inside: Tensor  # [teacher rows] bool, False where u + 1 is beyond the end (zero logits)
    teacher_live: Tensor  # [teacher rows] bool, loss mask at u; always true on a host plan
    teacher_row: Tensor  # [L, teacher rows] query row of position u - k
    teacher_valid: Tensor  # [L, teacher rows] bool, u - k is not before the start, and a row of this rank
    denominators: Tensor  # [L] fp32, loss-masked positions of each step
    positions: Tensor  # scalar fp32, loss-masked positions of step 0 on all ranks that share the batch
    context: Context | None = None

    @property
    def rows(self) -> int:
        """Number of query rows."""
        return self.row_key.numel()

    @property
    def keys(self) -> int:
        """Number of key rows, on all ranks that share the batch."""
        return sum(self.key_counts)

    def on(self, device: torch.device) -> StepPlan:
        """Return the plan with its tensors on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {n: uploaded(v, device) for n, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def plan_step(
    mask: Tensor,
    attention_mask: Tensor,
    ttt_length: int,
    device: torch.device,
    *,
    every_row: bool,
    dense: bool,
    layout: Layout | None = None,
    context: Context | None = None,
) -> StepPlan:
    """Return the plan of a batch.

    Args:
        mask: `step_mask`, bool ``[batch, tokens]``.
        attention_mask: ``[batch, tokens]``.
        ttt_length: L.
        device: of the draft.
        every_row: compute every row, live or not (masks on a device, or logits wanted for all rows).
        dense: every sample has the same number of key rows (for attention kernels without packing).
        layout: where the samples lie, on the masks' device; by default padded as the masks are.
        context: the ranks that share the batch, whose masks are in host memory; neither `every_row` nor `dense`.
    """
    layout = layout or Layout.like(mask)
    grid = _Grid.of(mask, layout, ttt_length, every_row=every_row, dense=dense)
    padding = grid.pick(attention_mask.to(mask.device) == 0, grid.is_key)
    if context is not None:
        grid = grid.shared(context)
    tensors = {**_row_tensors(grid), **_token_tensors(grid, ttt_length), **_teacher_tensors(grid, mask, ttt_length)}
    tensors["row_token"] = tensors["key_token"][tensors["row_key"]]
    if context is not None:
        tensors |= _part_of_keys(tensors, ttt_length, context)
    counted = (tensors["teacher_valid"] & tensors["teacher_live"]).sum(1)
    plan = StepPlan(
        ttt_length=ttt_length,
        key_counts=grid.key_counts,
        key_padding=None if mask.device.type == "cpu" and not padding.any() else padding,
        row_bounds=grid.row_bounds,
        row_flat=tensors.pop("row_flat", None),
        denominators=counted.to(torch.float32),
        positions=mask.sum().to(torch.float32),
        context=context,
        **tensors,
    )
    return plan.on(device)


@dataclass(frozen=True)
class _Grid:
    """All positions of a batch, and which of them are key rows and query rows; tensors are where the mask is."""

    position: Tensor  # [batch, tokens] t
    layout: Layout
    key_counts: tuple[int, ...]
    is_key: Tensor  # [batch, tokens] bool
    is_row: Tensor  # [batch, tokens] bool
    is_taught: Tensor  # [batch, tokens] bool, the rows whose loss is counted here
    every_row: bool  # all of them are both

    @classmethod
    def of(cls, mask: Tensor, layout: Layout, ttt_length: int, *, every_row: bool, dense: bool) -> _Grid:
        batch, tokens = mask.shape
        if every_row:
            is_row, counts = torch.ones_like(mask), [tokens] * batch
        else:
            is_row = mask.clone()
            for k in range(1, ttt_length):
                is_row |= shift_left(mask, k)
            is_row[0, 0] |= ~is_row.any()  # an empty share of a window still takes part in every collective
            ends = (is_row * torch.arange(1, tokens + 1)).amax(dim=1)
            counts = [int(end) for end in ends]
            if dense:
                counts = [max(counts)] * batch
        position = torch.arange(tokens, device=mask.device).expand(batch, tokens)
        is_key = position < torch.tensor(counts, device=mask.device).unsqueeze(1)
        return cls(position, layout, tuple(counts), is_key, is_row, is_row, every_row)

    def shared(self, context: Context) -> _Grid:
        """Return the grid with the query rows of this rank; one without any computes a row and does not count it."""
        rows = self.is_row.nonzero()
        taught = torch.zeros_like(self.is_row)
        taught[tuple(rows[context.mirrored(len(rows)) == context.rank].T)] = True
        computed = taught.clone()
        computed[tuple(rows[0])] |= ~taught.any()
        return replace(self, is_row=computed, is_taught=taught)

    def flat(self, position: Tensor) -> Tensor:
        """Return the flat index of each `position` ``[batch, n]``; those beyond a sample's end become its last one."""
        samples = torch.arange(len(position), device=position.device).unsqueeze(1)
        return self.layout.inside(samples, position)

    def within(self, position: Tensor) -> Tensor:
        """Return which of `position` ``[batch, n]`` are not beyond the end of their sample."""
        return position < self.layout.limits.unsqueeze(1)

    @property
    def row_bounds(self) -> tuple[Sequence[int], ...]:
        """`StepPlan.row_bounds`."""
        if self.every_row:
            return tuple(range(count) for count in self.key_counts)
        return tuple(row.nonzero().flatten().tolist() for row in self.is_row)

    def pick(self, values: Tensor, chosen: Tensor) -> Tensor:
        """Return the `chosen` ones of `values`, both ``[batch, n]``, packed; with `every_row` all of them."""
        return values.flatten() if self.every_row else values.expand_as(chosen)[chosen]


def _packed_index(chosen: Tensor) -> Tensor:
    """Return the index among the chosen, int64 ``[batch, n]``, of each one of `chosen`."""
    return chosen.flatten().cumsum(0).view(chosen.shape) - 1


def _row_tensors(grid: _Grid) -> dict[str, Tensor]:
    """Return the plan's tensors of key rows and query rows."""
    return {
        "key_flat": grid.pick(grid.flat(grid.position), grid.is_key),
        "key_positions": grid.pick(grid.position, grid.is_key),
        "row_key": grid.pick(_packed_index(grid.is_key), grid.is_row),
        "row_positions": grid.pick(grid.position, grid.is_row),
    }


def _token_tensors(grid: _Grid, ttt_length: int) -> dict[str, Tensor]:
    """Return the plan's tensors of token rows: those of the key rows and the L - 1 after them."""
    batch, tokens = grid.position.shape
    span = torch.arange(tokens + ttt_length - 1, device=grid.position.device).expand(batch, -1)
    key_count = grid.is_key.sum(dim=1, keepdim=True)
    is_token = (span < key_count + ttt_length - 1) & (key_count > 0)
    return {
        "token_flat": grid.pick(grid.flat(span + 1), is_token),
        "token_inside": grid.pick(grid.within(span + 1), is_token),
        "key_token": grid.pick(_packed_index(is_token)[:, :tokens], grid.is_key),
    }


def _teacher_tensors(grid: _Grid, mask: Tensor, ttt_length: int) -> dict[str, Tensor]:
    """Return the plan's tensors of teacher rows."""
    row_index = _packed_index(grid.is_row).clamp(min=0)
    earlier = [grid.position - k for k in range(ttt_length)]
    valid = [(at >= 0) & grid.is_taught.gather(1, at.clamp(min=0)) for at in earlier]
    chosen = torch.ones_like(mask) if grid.every_row else mask & torch.stack(valid).any(0)
    return {
        "teacher_flat": grid.pick(grid.flat(grid.position + 1), chosen),
        "teacher_inside": grid.pick(grid.within(grid.position + 1), chosen),
        "teacher_live": grid.pick(mask, chosen),
        "teacher_row": torch.stack([grid.pick(row_index.gather(1, at.clamp(min=0)), chosen) for at in earlier]),
        "teacher_valid": torch.stack([grid.pick(known, chosen) for known in valid]),
    }


def _part_of_keys(tensors: dict[str, Tensor], ttt_length: int, context: Context) -> dict[str, Tensor]:
    """Return those of the plan's `tensors` that are other ones where ranks share a batch: this rank's keys and tokens.

    Its tokens are those of its key rows at step 0, and of its query rows at all steps, wherever another rank's begin.
    """
    part = context.part(len(tensors["key_flat"]))
    key_token, row_token = tensors["key_token"][part], tensors["row_token"]
    needed = distinct(torch.cat((key_token, (row_token[:, None] + torch.arange(ttt_length)).flatten())))
    return {
        "key_flat": tensors["key_flat"][part],
        "key_positions": tensors["key_positions"][part],
        "key_token": torch.searchsorted(needed, key_token),
        "row_token": torch.searchsorted(needed, row_token),
        "row_flat": tensors["key_flat"][tensors["row_key"]],
        "token_flat": tensors["token_flat"][needed],
        "token_inside": tensors["token_inside"][needed],
    }
