"""What a training step is given, and which of its rows have work to do.

Everything is unshifted on the way in; the shifts of the method are made here. Position u of the shifted sequence
belongs to token u + 1: it has that token's embedding and target logits, and its logits predict token u + 2. Test step k
at position t works on u = t + k, so teacher and mask depend on u alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from disagg_core.errors import BadInput

MaskMode = Literal["aligned", "compat"]


@dataclass(frozen=True)
class Eagle3Batch:
    """A right-padded batch of captured samples, unshifted.

    Keep the two masks in host memory, also for a draft on a GPU: the step then knows its live rows without a device
    synchronisation. `to` does so. With masks on the GPU every row is computed.
    """

    input_ids: Tensor  # [batch, tokens] integer
    attention_mask: Tensor  # [batch, tokens] integer or bool, 1 where a token stands
    loss_mask: Tensor  # [batch, tokens] integer or bool, 1 where the token is trained on
    aux_hidden_states: Tensor  # [batch, tokens, 3 * target_hidden], low layer to high
    last_hidden_state: Tensor  # [batch, tokens, target_hidden], after the target's final norm

    @classmethod
    def of(cls, tensors: Eagle3Batch | Mapping[str, Tensor]) -> Eagle3Batch:
        """Return `tensors` as a checked batch.

        Raises:
            BadInput: a tensor is missing or the shapes do not fit each other.
        """
        names = [field.name for field in fields(cls)]
        if isinstance(tensors, Mapping):
            missing = [name for name in names if name not in tensors]
            if missing:
                raise BadInput(f"batch: expected {', '.join(names)}; missing: {', '.join(missing)}")
            tensors = cls(**{name: tensors[name] for name in names})
        shape = tensors.input_ids.shape
        for name in names:
            tensor: Tensor = getattr(tensors, name)
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
    key_flat: Tensor  # [key rows] index into batch * tokens
    key_positions: Tensor  # [key rows] t
    key_padding: Tensor | None  # [key rows] bool, True where the key must not be attended to
    row_key: Tensor  # [rows] index into the key rows
    row_positions: Tensor  # [rows] t
    row_bounds: tuple[Sequence[int], ...]  # t of the query rows of each sample, in host memory
    token_flat: Tensor  # [token rows] index into batch * tokens of token u + 1, for u < key_counts[b] + L - 1
    token_inside: Tensor  # [token rows] bool, False where u + 1 is beyond the end (embedding of id 0)
    key_token: Tensor  # [key rows] index into the token rows for step 0; step k is k further
    teacher_flat: Tensor  # [teacher rows] index into batch * tokens of token u + 1
    teacher_inside: Tensor  # [teacher rows] bool, False where u + 1 is beyond the end (zero logits)
    teacher_live: Tensor  # [teacher rows] bool, loss mask at u; always true on a host plan
    teacher_row: Tensor  # [L, teacher rows] query row of position u - k
    teacher_valid: Tensor  # [L, teacher rows] bool, u - k is not before the start
    denominators: Tensor  # [L] fp32, loss-masked positions of each step

    @property
    def rows(self) -> int:
        """Number of query rows."""
        return self.row_key.numel()


def plan_step(
    mask: Tensor, attention_mask: Tensor, ttt_length: int, device: torch.device, *, every_row: bool, dense: bool
) -> StepPlan:
    """Return the plan of a batch.

    Args:
        mask: `step_mask`, bool ``[batch, tokens]``.
        attention_mask: ``[batch, tokens]``.
        ttt_length: L.
        device: of the draft.
        every_row: compute every row, live or not (masks on a device, or logits wanted for all rows).
        dense: every sample has the same number of key rows (for attention kernels without packing).
    """
    batch, tokens = mask.shape
    where = mask.device
    if every_row:
        live_rows = torch.ones_like(mask)
        counts = [tokens] * batch
    else:
        live_rows = mask.clone()
        for k in range(1, ttt_length):
            live_rows |= shift_left(mask, k)
        live_rows[0, 0] |= ~live_rows.any()  # an empty share of a window still takes part in every collective
        ends = (live_rows * torch.arange(1, tokens + 1)).amax(dim=1)
        counts = [int(end) for end in ends]
        if dense:
            counts = [max(counts)] * batch
    position = torch.arange(tokens, device=where).expand(batch, tokens)
    starts = torch.arange(batch, device=where).unsqueeze(1) * tokens
    key_count = torch.tensor(counts, device=where).unsqueeze(1)
    is_key = position < key_count
    key_index = is_key.flatten().cumsum(0).view(batch, tokens) - 1
    span = torch.arange(tokens + ttt_length - 1, device=where).expand(batch, -1)
    is_token = (span < key_count + ttt_length - 1) & (key_count > 0)
    token_index = is_token.flatten().cumsum(0).view(batch, -1) - 1
    row_index = live_rows.flatten().cumsum(0).view(batch, tokens) - 1

    def pick(values: Tensor, chosen: Tensor) -> Tensor:
        return values.flatten() if every_row else values.expand_as(chosen)[chosen]

    teacher = torch.ones_like(mask) if every_row else mask
    earlier = torch.stack([position - k for k in range(ttt_length)])  # [L, batch, tokens]
    valid = earlier >= 0
    teacher_row = torch.stack([row_index.gather(1, at.clamp(min=0)) for at in earlier])
    padding = pick(attention_mask.to(where) == 0, is_key)
    plan_tensors = {
        "key_flat": pick(starts + position, is_key),
        "key_positions": pick(position, is_key),
        "row_key": pick(key_index, live_rows),
        "row_positions": pick(position, live_rows),
        "token_flat": pick(starts + (span + 1).clamp(max=tokens - 1), is_token),
        "token_inside": pick(span + 1 < tokens, is_token),
        "key_token": pick(token_index[:, :tokens], is_key),
        "teacher_flat": pick(starts + (position + 1).clamp(max=tokens - 1), teacher),
        "teacher_inside": pick(position + 1 < tokens, teacher),
        "teacher_live": pick(mask, teacher),
        "teacher_row": torch.stack([pick(at, teacher) for at in teacher_row]),
        "teacher_valid": torch.stack([pick(at, teacher) for at in valid]),
        "denominators": torch.stack([mask[:, k:].sum() for k in range(ttt_length)]).to(torch.float32),
    }
    bounds: list[Sequence[int]] = [range(tokens)] * batch
    if not every_row:
        bounds = [row.nonzero().flatten().tolist() for row in live_rows]
    return StepPlan(
        ttt_length=ttt_length,
        key_counts=tuple(counts),
        key_padding=None if where.type == "cpu" and not padding.any() else _upload(padding, device),
        row_bounds=tuple(bounds),
        **{name: _upload(tensor, device) for name, tensor in plan_tensors.items()},
    )


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a GPU without waiting for it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
