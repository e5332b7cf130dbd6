"""What a training step is given, and the blocks that it computes.

Nothing is shifted: slot s of the block with anchor p stands at position p + s and predicts the token there. Slot 0
holds the anchor's token and predicts nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from disagg_core.drafts.context import Context, distinct, picked
from disagg_core.drafts.dflash.anchors import draw_anchors, stacked
from disagg_core.drafts.dflash.config import DFlashConfig
from disagg_core.drafts.dflash.options import BlockDraftSection, BlockShapeSection, default_gamma
from disagg_core.drafts.layout import Layout
from disagg_core.drafts.method import Batch, Batcher, Sample
from disagg_core.drafts.randomness import generator_of
from disagg_core.drafts.upload import uploaded
from disagg_core.errors import BadInput

_INPUTS = {"input_ids": 2, "loss_mask": 2, "hidden_states": 3, "anchors": 2, "block_keep": 2}
"""What a batch is made of, and how many dimensions each has."""


@dataclass(frozen=True)
class DFlashBatch:
    """A batch of captured samples with their blocks: right-padded, or with ids and states packed in one row.

    Only the states leave host memory. Where ranks share the batch, `block_keep` is of this rank's blocks.
    """

    input_ids: Tensor  # [batch, tokens] integer, packed [1, tokens of all]; so are the states
    loss_mask: Tensor  # [batch, tokens], 1 where the token is trained on; 0 where padding stands
    hidden_states: Tensor  # [batch, tokens, C * H], low layer to high
    anchors: Tensor  # [batch, blocks] int64
    block_keep: Tensor  # [batch, blocks] bool, False where no block is
    last_hidden_state: Tensor | None = None  # [batch, tokens, H], after the target's final norm; for its labels
    packing: Layout | None = None  # where a packed batch has its samples
    context: Context | None = None  # the ranks that share the batch
    kept_by_all: Tensor | None = None  # [batch, blocks] bool, the blocks of all of them together
    taught: Tensor | None = None
    """``[n]`` int64, ascending: tokens whose last states are there; then the others are those of the rank's context."""

    @property
    def layout(self) -> Layout:
        """Where its samples lie."""
        return self.packing or Layout.like(self.loss_mask)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> DFlashBatch:
        """Return `tensors` as a checked batch.

        Raises:
            BadInput: a tensor is missing or the shapes do not fit each other.
        """
        missing = [name for name in _INPUTS if name not in tensors]
        if missing:
            raise BadInput(f"batch: expected {', '.join(_INPUTS)}; missing: {', '.join(missing)}")
        first = tensors["input_ids"].shape
        faults = [
            f"{name}: expected {dims} dimensions, found {list(tensors[name].shape)}"
            for name, dims in _INPUTS.items()
            if tensors[name].dim() != dims
        ]
        if not faults:
            faults = [
                f"{name}: expected shape {list(expected)}..., found {list(tensors[name].shape)}"
                for name, expected in {
                    "loss_mask": first,
                    "hidden_states": first,
                    "anchors": first[:1],
                    "block_keep": tensors["anchors"].shape,
                }.items()
                if tensors[name].shape[: len(expected)] != expected
            ]
        if faults:
            raise BadInput(f"batch: {'; '.join(faults)}")
        return cls(
            input_ids=tensors["input_ids"].cpu(),
            loss_mask=tensors["loss_mask"].cpu(),
            hidden_states=tensors["hidden_states"],
            anchors=tensors["anchors"].cpu(),
            block_keep=tensors["block_keep"].cpu(),
            last_hidden_state=tensors.get("last_hidden_state"),
        )

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> DFlashBatch:
        """Move the states to `device`; what the blocks are planned from stays where it is."""
        last = self.last_hidden_state
        return replace(
            self,
            hidden_states=self.hidden_states.to(device, non_blocking=non_blocking),
            last_hidden_state=None if last is None else last.to(device, non_blocking=non_blocking),
        )

    def moved(self) -> tuple[Tensor, ...]:
        """Return the states."""
        return tuple(x for x in (self.hidden_states, self.last_hidden_state) if x is not None)


@dataclass(frozen=True)
class BlockPlan:
    """The M blocks of a batch and the context rows that they see, both packed sample by sample without padding.

    Blocks of a sample ascend by anchor. Tensors are int64 on the draft's device unless said otherwise. Where ranks
    share the batch, blocks are this rank's, and context rows too are those of an equal part of all.
    """

    block_size: int
    samples: tuple[tuple[int, int, int, int], ...]  # first and last-plus-one block, and context row, of each sample
    bounds: Sequence[int]  # [M] anchor of each block, in host memory
    block_flat: Tensor  # [M] index into batch * blocks
    anchors: Tensor  # [M]
    context_rows: int  # of all ranks that share the batch
    context_start: Tensor  # [M] which of these is position 0 of the block's sample
    context_flat: Tensor  # [context rows] index into the batch's tokens, flattened over its rows
    context_positions: Tensor  # [context rows]
    tokens: Tensor  # [M, K] ids that are embedded: the anchor's, then the mask token
    positions: Tensor  # [M, K]
    source_flat: Tensor  # [M, K] index, as of context rows, of the slot's own token; the last one beyond the end
    last_flat: Tensor  # [M, K] the same among the batch's last states; where ranks share it, of trained slots only
    labels: Tensor  # [M, K] the token to predict: the slot's own, or one ahead of it
    mask: Tensor  # [M, K] fp32, 1 where a slot is trained
    trained: Sequence[int]  # [M] trained slots of each block, in host memory
    trained_flat: Tensor  # [R] index into M * K of the trained slots
    taught_flat: Tensor  # [P] index into the batch's last states of the tokens before trained slots, each once
    taught_by: Tensor  # [R] which of these a trained slot has
    longest: int  # tokens of the longest sample, padding included
    context: Context | None

    @property
    def blocks(self) -> int:
        """M."""
        return len(self.bounds)


def plan_blocks(
    batch: DFlashBatch,
    block_size: int,
    mask_token_id: int,
    device: torch.device,
    *,
    trained: Tensor | None = None,
    ahead: int = 0,
) -> BlockPlan:
    """Return the plan of `batch`, whose ids, mask and anchors are in host memory, for a draft on `device`.

    `trained` says which slots are, bool ``[batch, blocks, K]``, by default as `slot_mask` does. A slot's label stands
    `ahead` tokens after the slot.
    """
    layout = batch.layout
    row, column = _ordered(batch, batch.block_keep)
    anchors = batch.anchors[row, column]
    samples, context_rows, context = _seen_by(batch, row, anchors)
    positions = anchors[:, None] + torch.arange(block_size)
    source = layout.inside(row[:, None], positions)
    mask = (slot_mask(batch, block_size) if trained is None else trained)[row, column]
    ids = torch.full_like(positions, mask_token_id)
    flat_ids = batch.input_ids.flatten().long()
    ids[:, 0] = flat_ids[source[:, 0]]
    trained_flat = mask.flatten().nonzero().flatten()
    taught_flat, taught_by = torch.unique(source.flatten()[trained_flat] - 1, return_inverse=True)
    tensors = {
        "block_flat": row * batch.anchors.shape[1] + column,
        "anchors": anchors,
        **context,
        "tokens": ids,
        "positions": positions,
        "source_flat": source,
        "last_flat": _place(batch, source),
        "labels": flat_ids[layout.inside(row[:, None], positions + ahead)],
        "mask": mask.float(),
        "trained_flat": trained_flat,
        "taught_flat": _place(batch, taught_flat),
        "taught_by": taught_by,
    }
    return BlockPlan(
        block_size=block_size,
        samples=samples,
        bounds=anchors.tolist(),
        context_rows=context_rows,
        trained=mask.sum(1).tolist(),
        longest=layout.width,
        context=batch.context,
        **{name: uploaded(tensor, device) for name, tensor in tensors.items()},
    )


def _ordered(batch: DFlashBatch, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return sample and column of the blocks that are `kept`, by sample and anchor."""
    row, column = kept.nonzero(as_tuple=True)
    order = torch.argsort(row * (batch.layout.width + 1) + batch.anchors[row, column], stable=True)
    return row[order], column[order]


def _place(batch: DFlashBatch, tokens: Tensor) -> Tensor:
    """Return where the last states of `tokens` are in the batch."""
    return tokens if batch.taught is None else torch.searchsorted(batch.taught, tokens)


def _seen_by(
    batch: DFlashBatch, row: Tensor, anchors: Tensor
) -> tuple[tuple[tuple[int, int, int, int], ...], int, dict[str, Tensor]]:
    """Return what the blocks see, which `row` and `anchors` are of: `_contexts`, with the number of context rows."""
    if batch.context is None or batch.kept_by_all is None:
        samples, context = _contexts(batch.layout, row, anchors)
        return samples, len(context["context_flat"]), context
    row, column = _ordered(batch, batch.kept_by_all)
    samples, context = _contexts(batch.layout, row, batch.anchors[row, column])
    own = batch.block_keep[row, column]
    before = [0, *own.cumsum(0).tolist()]
    ours = tuple(
        (before[first], before[last], start, end) for first, last, start, end in samples if before[first] < before[last]
    )
    flat, positions = context["context_flat"], context["context_positions"]
    part = batch.context.part(len(flat))
    context = {
        "context_start": context["context_start"][own],
        "context_flat": flat[part] if batch.taught is None else torch.arange(len(part)),
        "context_positions": positions[part],
    }
    return ours, len(flat), context


def _contexts(
    layout: Layout, row: Tensor, anchors: Tensor
) -> tuple[tuple[tuple[int, int, int, int], ...], dict[str, Tensor]]:
    """Return of each sample with blocks, which `row` and `anchors` are sorted by, what its blocks see before them.

    First the ranges of its blocks and of its context rows, then where these rows lie.
    """
    starts_at = layout.starts.tolist()
    nothing = torch.empty(0, dtype=torch.int64)
    samples, flat, positions, starts = [], [nothing], [nothing], [nothing]
    block = context = 0
    for sample, group in groupby(row.tolist()):
        count = len(list(group))
        seen = int(anchors[block + count - 1])
        samples.append((block, block + count, context, context + seen))
        positions.append(torch.arange(seen))
        flat.append(starts_at[sample] + torch.arange(seen))
        starts.append(torch.full((count,), context))
        block, context = block + count, context + seen
    rows = {"context_start": starts, "context_flat": flat, "context_positions": positions}
    return tuple(samples), {name: torch.cat(parts) for name, parts in rows.items()}


def slot_mask(batch: DFlashBatch, block_size: int) -> Tensor:
    """Return which slots are trained, bool ``[batch, blocks, K]``.

    Those of a block, after the anchor, not beyond the end, whose token is trained on.
    """
    tokens = batch.loss_mask.shape[1]
    positions = batch.anchors[:, :, None] + torch.arange(block_size)
    inside = positions.clamp(max=tokens - 1)
    trained = (batch.loss_mask != 0).gather(1, inside.flatten(1)).view(positions.shape)
    return batch.block_keep[:, :, None] & (positions < tokens) & (torch.arange(block_size) > 0) & trained


def decay(block_size: int, gamma: float | None) -> Tensor:
    """Return the fixed weight of each slot, fp64 ``[K]``: ``exp(-(s - 1) / gamma)``, 1 for slot 0 and without gamma."""
    slots = torch.arange(block_size, dtype=torch.float64)
    return torch.ones_like(slots) if gamma is None else (-(slots - 1).clamp(min=0) / gamma).exp()


class BlockBatcher(Batcher):
    """Makes batches of captured samples with the blocks that are drawn for them; see `Batcher`."""

    def __init__(self, options: BlockShapeSection, config: DFlashConfig, *, seed: int, last_state: bool) -> None:
        self._shape, self._config, self._seed, self._last_state = options, config, seed, last_state

    @abstractmethod
    def slot_mask(self, batch: DFlashBatch) -> Tensor:
        """Return which slots are trained, bool ``[batch, blocks, K]``."""

    def collate(
        self, samples: Sequence[Sample], *, multiple_of: int = 1, packed: bool = False, pin: bool = False
    ) -> DFlashBatch:
        """Return `samples` as a batch, with their blocks."""
        layout = Layout.of([len(sample) for sample in samples], multiple_of=multiple_of, packed=packed, pin=pin)
        anchors, keep = stacked([self._anchors(sample) for sample in samples])
        states = [self._states(sample) for sample in samples]
        last = [sample.tensors["last_hidden_state"] for sample in samples] if self._last_state else None
        return DFlashBatch(
            input_ids=layout.laid(
                [sample.tensors["input_ids"] for sample in samples], multiple_of=multiple_of, dtype=torch.int64
            ),
            loss_mask=layout.grid([sample.tensors["loss_mask"] for sample in samples]),
            hidden_states=layout.laid(states, multiple_of=multiple_of),
            anchors=anchors,
            block_keep=keep,
            last_hidden_state=None if last is None else layout.laid(last, multiple_of=multiple_of),
            packing=layout if packed else None,
        )

    def shared(self, batch: Batch, context: Context, *, pin: bool = False) -> DFlashBatch:
        """Return the part of `batch` of this rank: some blocks, and an equal part of what the blocks of all see."""
        own = _with_own_blocks(_own(batch), context)
        size, mask_id = self._config.block_size, self._config.mask_token_id
        plan = plan_blocks(own, size, mask_id, own.loss_mask.device, trained=self.slot_mask(own))
        tokens, last = plan.source_flat.flatten()[plan.trained_flat], own.last_hidden_state
        taught = distinct(torch.cat(((tokens - 1).clamp(min=0), tokens)))
        return replace(
            own,
            hidden_states=picked(own.hidden_states, plan.context_flat, pin=pin),
            last_hidden_state=None if last is None else picked(last, taught, pin=pin),
            taught=taught,
        )

    def dummy(self) -> DFlashBatch:
        """Return one sample of three tokens with one block, which has a context."""
        config, length = self._config, 3
        width = len(config.target_layer_ids) * config.hidden_size
        return DFlashBatch(
            input_ids=torch.zeros(1, length, dtype=torch.int64),
            loss_mask=torch.ones(1, length, dtype=torch.uint8),
            hidden_states=torch.zeros(1, length, width),
            anchors=torch.ones(1, 1, dtype=torch.int64),
            block_keep=torch.ones(1, 1, dtype=torch.bool),
            last_hidden_state=torch.zeros(1, length, config.hidden_size) if self._last_state else None,
        )

    def trainable_positions(self, batch: Batch) -> int:
        """Return how many slots of `batch` are trained."""
        return int(self.slot_mask(_own(batch)).sum())

    def _anchors(self, sample: Sample) -> Tensor:
        generator = generator_of(self._seed, sample.sample_id, "anchors")
        return draw_anchors(sample.tensors["loss_mask"], self._shape.anchors, generator)

    def _states(self, sample: Sample) -> Tensor:
        states, noise = sample.tensors["aux_hidden_states"], self._shape.noise
        if not noise:
            return states
        generator = generator_of(self._seed, sample.sample_id, "noise")
        return states + (torch.rand(states.shape, generator=generator) * (2 * noise) - noise).to(states.dtype)


class DFlashBatcher(BlockBatcher):
    """A `BlockBatcher` for DFlash's loss."""

    def __init__(self, options: BlockDraftSection, config: DFlashConfig, *, seed: int) -> None:
        super().__init__(options, config, seed=seed, last_state=options.loss.label == "teacher")
        self._loss = options.loss
        self._decay = decay(config.block_size, options.loss.gamma or default_gamma(config.block_size))

    def slot_mask(self, batch: DFlashBatch) -> Tensor:
        """Return which slots are trained, bool ``[batch, blocks, K]``."""
        return slot_mask(batch, self._config.block_size)

    def normalisers(self, batch: Batch | None) -> dict[str, float]:
        """Return what `batch` adds to the number that the window's loss is divided by, as ``loss``."""
        if batch is None:
            return {"loss": 0.0}
        return {"loss": float(divisor(self.slot_mask(_own(batch)), self._loss.divides_by, self._decay))}


def divisor(mask: Tensor, by: str, weights: Tensor) -> Tensor:
    """Return what trained slots ``[batch, blocks, K]`` add to the loss's divisor, fp64 scalar.

    Args:
        mask: bool.
        by: ``weights``, ``positions`` or ``sequences``.
        weights: fixed weight of each slot, fp64 ``[K]``.
    """
    if by == "sequences":
        return torch.tensor(float(mask.shape[0]), dtype=torch.float64)
    counted = mask.flatten(0, 1).sum(0).double()
    return (counted * weights).sum() if by == "weights" else counted.sum()


def _own(batch: Batch) -> DFlashBatch:
    assert isinstance(batch, DFlashBatch)
    return batch


def _with_own_blocks(batch: DFlashBatch, context: Context) -> DFlashBatch:
    """Return `batch`, uncut, with this rank's blocks; a rank without any computes one and is not trained on it."""
    row, column = _ordered(batch, batch.block_keep)
    mine = context.mirrored(len(row)) == context.rank
    keep, mask = torch.zeros_like(batch.block_keep), batch.loss_mask
    keep[row[mine], column[mine]] = True
    if not mine.any():
        keep[row[0], column[0]] = True
        mask = torch.zeros_like(mask)
    return replace(batch, block_keep=keep, loss_mask=mask, context=context, kept_by_all=batch.block_keep)
