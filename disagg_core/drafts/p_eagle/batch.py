"""What a training step is given, and the rows that it computes.

Position o of the shifted sequence has the target's states of token o, the embedding of token o + 1 and, as its teacher,
the target's distribution after token o + 1; it predicts token o + 2. It is trained when token o + 2 is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from disagg_core.drafts.context import Context, picked
from disagg_core.drafts.layout import Layout
from disagg_core.drafts.method import Batch, Batcher, Sample
from disagg_core.drafts.p_eagle.attention import PADDING, AttentionPlan, Share, plan_attention
from disagg_core.drafts.p_eagle.config import PEagleConfig
from disagg_core.drafts.p_eagle.model import LAYERS_READ
from disagg_core.drafts.p_eagle.options import PEagleSection
from disagg_core.drafts.p_eagle.sampling import Rows, sample_rows
from disagg_core.drafts.randomness import generator_of
from disagg_core.drafts.upload import uploaded
from disagg_core.errors import BadInput

AHEAD = 2
"""How far the token that a row predicts is ahead of the row's position."""
_DUMMY_TOKENS = 4


@dataclass(frozen=True)
class PEagleBatch:
    """A batch of captured samples with the rows drawn for them; states and ids leave host memory.

    It is right-padded, or has ids and states packed in one row. A row is of the sequence `sequences`, of which a sample
    is one; `packed_batch` makes several of what counts as one sample.
    """

    input_ids: Tensor  # [batch, tokens] int64, shifted left by one, 0 beyond the end; packed [1, tokens of all]
    mask: Tensor  # [batch, tokens] bool, which positions are trained
    hidden_states: Tensor  # [batch, tokens, 3 * H], low layer to high
    teacher: Tensor  # [batch, tokens, H] after the final norm, or target logits [batch, tokens, V]; shifted left by one
    samples: Tensor  # [rows] int64, which row of the mask
    sequences: Tensor  # [rows] int64
    anchors: Tensor  # [rows] int64
    depths: Tensor  # [rows] int64
    packing: Layout | None = None  # where a packed batch has its samples
    context: Context | None = None  # ranks that share the rows; ids and states are those that this one's name, in order

    @property
    def layout(self) -> Layout:
        """Where its samples lie."""
        return self.packing or Layout.like(self.mask)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PEagleBatch:
        """Move states and ids to `device`; what the rows are planned from stays where it is."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=non_blocking),
            hidden_states=self.hidden_states.to(device, non_blocking=non_blocking),
            teacher=self.teacher.to(device, non_blocking=non_blocking),
        )

    def moved(self) -> tuple[Tensor, ...]:
        """Return states and ids."""
        return self.input_ids, self.hidden_states, self.teacher

    @property
    def trained(self) -> Tensor:
        """Which rows are trained, bool ``[rows]``."""
        return self.mask[self.samples, self.anchors + self.depths]


def packed_batch(inputs: Mapping[str, Tensor]) -> PEagleBatch:
    """Return one packed row of sequences with rows that were drawn elsewhere.

    Args:
        inputs: ``input_ids`` [1, S] and ``target_logits`` [1, S, V], both shifted left by one, ``loss_mask`` [1, S] and
            ``hidden_states`` [1, S, 3 * H], not shifted, ``anchor_pos`` and ``depth`` [R], and optionally ``lengths``
            of the sequences, after which padding stands; without it there is one sequence.

    Raises:
        BadInput: a tensor is missing or the shapes do not fit each other; a row stands outside of the sequence.
    """
    names = ("input_ids", "loss_mask", "hidden_states", "target_logits", "anchor_pos", "depth")
    missing = [name for name in names if name not in inputs]
    if missing:
        raise BadInput(f"batch: expected {', '.join(names)}; missing: {', '.join(missing)}")
    shape = (1, inputs["input_ids"].shape[-1])
    faults = [
        f"{name}: expected shape {list(shape)}..., found {list(inputs[name].shape)}"
        for name in names[:4]
        if tuple(inputs[name].shape[:2]) != shape
    ]
    anchors, depths = inputs["anchor_pos"].cpu().long().flatten(), inputs["depth"].cpu().long().flatten()
    lengths = inputs.get("lengths", torch.tensor([shape[1]])).cpu().long().flatten()
    if anchors.shape != depths.shape or not len(anchors):
        faults.append(f"depth: expected {max(1, len(anchors))} of them, one for each anchor_pos, found {len(depths)}")
    elif min(int(anchors.min()), int(depths.min())) < 0 or int((anchors + depths).max()) >= shape[1]:
        faults.append(f"anchor_pos, depth: expected rows from 0 to {shape[1] - 1}, found one outside")
    if int(lengths.sum()) > shape[1]:
        faults.append(f"lengths: expected a sum of at most {shape[1]}, found {int(lengths.sum())}")
    if faults:
        raise BadInput(f"batch: {'; '.join(faults)}")
    sequence_of = torch.full((shape[1],), PADDING)
    sequence_of[: int(lengths.sum())] = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return PEagleBatch(
        input_ids=inputs["input_ids"].long(),
        mask=inputs["loss_mask"].cpu() != 0,
        hidden_states=inputs["hidden_states"],
        teacher=inputs["target_logits"],
        samples=torch.zeros_like(anchors),
        sequences=sequence_of[anchors],
        anchors=anchors,
        depths=depths,
    )


@dataclass(frozen=True)
class RowPlan:
    """The rows of a step, sorted by sequence, anchor and depth; int64 tensors on the draft's device.

    The distinct inputs are those of the depth-0 rows, and after them the one that all other rows share.
    """

    attention: AttentionPlan
    given: Tensor  # [rows] index of each row in the batch
    positions: Tensor  # [rows] RoPE positions
    input_flat: Tensor  # [n] index into the batch's tokens, flattened over its rows, of the depth-0 rows
    source: Tensor  # [rows] which of the n + 1 inputs a row has
    live_rows: Tensor  # [L] rows that are trained, sorted by teacher
    live_depths: Tensor  # [L]
    live_teacher: Tensor  # [L] index among the teachers
    teacher_flat: Tensor  # [P] index, as of inputs, ascending
    teacher_bounds: Sequence[int]  # [P + 1] how many live rows the teachers before have, in host memory
    trained: Tensor  # [D] fp32, trained rows of each depth

    def of_picked(self) -> RowPlan:
        """Return the plan over a batch that has the tokens it names, and no others."""
        inputs, teachers = (torch.arange(len(x), device=x.device) for x in (self.input_flat, self.teacher_flat))
        return replace(self, input_flat=inputs, teacher_flat=teachers)


def plan_rows(batch: PEagleBatch, config: PEagleConfig, device: torch.device, *, every_row: bool = False) -> RowPlan:
    """Return the plan of `batch`; real slots after all that is trained are left out unless `every_row` is asked for."""
    layout, order = batch.layout, _sorted_rows(batch, batch.layout.width, every_row=every_row)
    sequences, anchors, depths = (x[order] for x in (batch.sequences, batch.anchors, batch.depths))
    share = Share.of(depths, batch.context) if batch.context is not None else None
    attention = plan_attention(sequences, anchors, depths, config.sliding_window, device, share)
    if share is not None:
        order, anchors, depths = (x[share.rows] for x in (order, anchors, depths))
    positions, first = anchors + depths, depths == 0
    flat = layout.inside(batch.samples[order], positions)
    trained = batch.trained[order] & (share is None or share.counted)
    live = trained.nonzero().flatten()
    live = live[torch.argsort(flat[live], stable=True)]
    teacher_flat, live_teacher, counts = torch.unique_consecutive(flat[live], return_inverse=True, return_counts=True)
    tensors = {
        "given": order,
        "positions": positions,
        "input_flat": flat[first],
        "source": torch.where(first, first.cumsum(0) - 1, first.sum()),
        "live_rows": live,
        "live_depths": depths[live],
        "live_teacher": live_teacher,
        "teacher_flat": teacher_flat,
        "trained": torch.bincount(depths[live], minlength=config.depths).float(),
    }
    return RowPlan(
        attention=attention,
        teacher_bounds=[0, *counts.cumsum(0).tolist()],
        **{name: uploaded(tensor, device) for name, tensor in tensors.items()},
    )


def _sorted_rows(batch: PEagleBatch, tokens: int, *, every_row: bool) -> Tensor:
    """Return the indices of the rows that are computed, by sequence, anchor and depth, padding last."""
    height = int(batch.depths.max()) + 1
    sequences = torch.where(batch.sequences == PADDING, batch.sequences.max() + 1, batch.sequences)
    order = torch.argsort((sequences * tokens + batch.anchors) * height + batch.depths)
    if every_row:
        return order
    # A key is seen from later positions of its own sequence only: none of those behind the last trained one is needed.
    last = torch.zeros(int(sequences.max()) + 1, dtype=torch.int64)
    positions = torch.where(batch.trained, batch.anchors + batch.depths, 0)
    last.scatter_reduce_(0, sequences, positions, "amax")
    return order[(batch.anchors <= last[sequences])[order]]


class PEagleBatcher(Batcher):
    """Makes batches of captured samples, each with rows of its own drawing; see `Batcher`."""

    def __init__(self, options: PEagleSection, config: PEagleConfig, *, seed: int) -> None:
        self._options, self._config, self._seed = options, config, seed

    def collate(
        self, samples: Sequence[Sample], *, multiple_of: int = 1, packed: bool = False, pin: bool = False
    ) -> PEagleBatch:
        """Return `samples` as one batch; padding is zero everywhere, hidden states keep their dtype."""
        layout = Layout.of([len(sample) for sample in samples], multiple_of=multiple_of, packed=packed, pin=pin)
        masks = [trained_positions(sample.tensors["loss_mask"]) for sample in samples]
        rows = [self._rows(sample, mask) for sample, mask in zip(samples, masks, strict=True)]
        numbers = torch.repeat_interleave(
            torch.arange(len(samples)), torch.tensor([len(drawn.anchors) for drawn in rows])
        )

        def laid(name: str, skip: int, dtype: torch.dtype | None = None) -> Tensor:
            return layout.laid(
                [sample.tensors[name][skip:] for sample in samples], multiple_of=multiple_of, dtype=dtype
            )

        return PEagleBatch(
            input_ids=laid("input_ids", 1, torch.int64),
            mask=layout.grid(masks),
            hidden_states=laid("aux_hidden_states", 0),
            teacher=laid("last_hidden_state", 1),
            samples=numbers,
            sequences=numbers,
            anchors=torch.cat([drawn.anchors for drawn in rows]),
            depths=torch.cat([drawn.depths for drawn in rows]),
            packing=layout if packed else None,
        )

    def shared(self, batch: Batch, context: Context, *, pin: bool = False) -> PEagleBatch:
        """Return the part of `batch` of this rank: whole chains, and the tokens that they read and are taught by."""
        assert isinstance(batch, PEagleBatch)
        plan = plan_rows(replace(batch, context=context), self._config, batch.mask.device)
        return replace(
            batch,
            input_ids=picked(batch.input_ids, plan.input_flat, pin=pin),
            hidden_states=picked(batch.hidden_states, plan.input_flat, pin=pin),
            teacher=picked(batch.teacher, plan.teacher_flat, pin=pin),
            context=context,
        )

    def dummy(self) -> PEagleBatch:
        """Return one short sample with nothing to train on."""
        hidden = self._config.hidden_size
        tensors = {
            "input_ids": torch.zeros(_DUMMY_TOKENS, dtype=torch.int32),
            "loss_mask": torch.zeros(_DUMMY_TOKENS, dtype=torch.uint8),
            "aux_hidden_states": torch.zeros(_DUMMY_TOKENS, LAYERS_READ * hidden),
            "last_hidden_state": torch.zeros(_DUMMY_TOKENS, hidden),
        }
        return self.collate([Sample("dummy", tensors)])

    def trainable_positions(self, batch: Batch) -> int:
        """Return the rows of all depths that are trained."""
        assert isinstance(batch, PEagleBatch)
        return int(batch.trained.sum())

    def normalisers(self, batch: Batch | None) -> dict[str, float]:
        """Return how many rows are trained; the loss is their mean, of all depths together."""
        return {"rows": 0.0 if batch is None else float(self.trainable_positions(batch))}

    def _rows(self, sample: Sample, mask: Tensor) -> Rows:
        options = self._options
        generator = generator_of(self._seed, sample.sample_id, "p_eagle")
        return sample_rows(mask, self._config.depths, options.retention, options.least_retention, generator)


def trained_positions(loss_mask: Tensor) -> Tensor:
    """Return which positions of a sample are trained, bool ``[tokens]``: those whose predicted token is."""
    mask = torch.zeros(loss_mask.numel(), dtype=torch.bool)
    mask[: max(0, loss_mask.numel() - AHEAD)] = loss_mask[AHEAD:] != 0
    return mask
