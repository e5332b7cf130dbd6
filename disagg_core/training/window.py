"""One optimizer window: its samples, how they are shared out over ranks, and what of them could not be used."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from disagg_core.contracts import SampleRef
from disagg_core.drafts.method import Sample
from disagg_core.errors import SampleUnusable
from disagg_core.training.inputs import DraftBatches


class GivenUp(msgspec.Struct, frozen=True):
    """A sample that could not be trained on. `lost`: the store no longer has it, so it has to be captured again."""

    sample_id: str
    reason: str
    lost: bool


@dataclass
class TrainingWindow:
    """One optimizer window on one rank.

    `refs` are all of the window, in published order; `own` those that this rank fetched, `given_up` what of
    these could not be used; `tokens` are those of the others. `drafts` are this rank's micro-batches for each draft.
    """

    refs: list[SampleRef]
    own: list[SampleRef]
    drafts: list[DraftBatches]
    tokens: int = 0
    wait_s: float = 0.0
    given_up: list[GivenUp] = field(default_factory=list)

    def oldest_age_s(self, now: float) -> float | None:
        """Seconds since the oldest sample of the window was captured; None where the references do not say."""
        captured = [ref.metadata["captured_at"] for ref in self.refs if "captured_at" in ref.metadata]
        return now - min(float(at) for at in captured if at is not None) if captured else None

    @property
    def samples(self) -> int:
        """Samples of this rank that are trained on."""
        return len(self.own) - len(self.given_up)

    @property
    def used(self) -> set[str]:
        """Ids of the samples of this rank that are trained on."""
        return {ref.sample_id for ref in self.own} - {item.sample_id for item in self.given_up}


@dataclass(frozen=True)
class Cut:
    """How a window is cut into micro-batches: `batch_size` samples each or, with `pack_tokens`, so many tokens.

    Without `by_length` some draft's loss depends on which samples share a micro-batch: they stay in published order.
    Which samples a window has never depends on the cut.
    """

    batch_size: int
    pack_tokens: int | None
    by_length: bool
    packed: bool
    """Whether samples of unlike lengths are packed in one row; padded ones share a micro-batch with their like."""

    def share(self, refs: Sequence[SampleRef], rank: int, size: int) -> list[list[int]]:
        """Return rank `rank`'s micro-batches of a window as indices into `refs`; every rank has as many of them."""
        if self.pack_tokens is not None and self.by_length:
            return packed_share_of(refs, rank, size, self.pack_tokens)
        if self.packed and self.by_length:
            return balanced_share_of(refs, rank, size, self.batch_size)
        return share_of(refs, rank, size, self.batch_size, by_length=self.by_length)


def share_of(refs: Sequence[SampleRef], rank: int, size: int, batch_size: int, *, by_length: bool) -> list[list[int]]:
    """Return rank `rank`'s micro-batches of a window as indices into `refs`.

    Every rank gets the same number of micro-batches, and micro-batches of one round are alike in size on all ranks.
    With `by_length`, samples of like length share a micro-batch and longer ones come first, which saves padding and
    waiting; otherwise the published order is kept. A full window fills every micro-batch.
    """
    order = sorted(range(len(refs)), key=lambda i: -refs[i].num_tokens) if by_length else list(range(len(refs)))
    rounds = -(-len(refs) // (batch_size * size))
    base, longer = divmod(len(refs), max(1, rounds * size))
    shares = []
    for slot in range(rank, rounds * size, size):
        first = slot * base + min(slot, longer)
        shares.append(order[first : first + base + (slot < longer)])
    return shares


def balanced_share_of(refs: Sequence[SampleRef], rank: int, size: int, batch_size: int) -> list[list[int]]:
    """Return rank `rank`'s micro-batches of a window as indices into `refs`: of up to `batch_size` samples each.

    A packed row costs what its tokens cost, whatever their samples: ranks get about equally many tokens, and so do the
    micro-batches of each. Every rank gets as many micro-batches, which a full window fills.
    """
    lengths = [ref.num_tokens for ref in refs]
    rounds = -(-len(refs) // (batch_size * size))
    own = _evenly(range(len(refs)), lengths, size, most=rounds * batch_size)[rank]
    return _evenly(own, lengths, rounds, most=batch_size)


def _evenly(indices: Sequence[int], lengths: Sequence[int], count: int, *, most: int) -> list[list[int]]:
    """Return `indices` in `count` parts of at most `most`, alike in the sum of their `lengths`.

    From the longest on, each goes to the part with the least that has room (longest processing time first).
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, part) for part in range(count)]  # a heap of those with room
    for index in sorted(indices, key=lambda i: -lengths[i]):
        load, part = heapq.heappop(loads)
        parts[part].append(index)
        if len(parts[part]) < most:
            heapq.heappush(loads, (load + lengths[index], part))
    return parts


def packed_share_of(refs: Sequence[SampleRef], rank: int, size: int, tokens: int) -> list[list[int]]:
    """Return rank `rank`'s micro-batches of a window as indices into `refs`: rows of at most `tokens` tokens.

    The samples are those of the window, whatever their order. From the longest on, each goes to the rank that has
    fewest tokens (longest processing time first), and there to the first row with room for it (first fit); a sample
    of more than `tokens` has a row of its own. Every rank gets the same number of rows, some of them perhaps empty.
    """
    loads = [0] * size
    rows: list[list[list[int]]] = [[] for _ in range(size)]
    filled: list[list[int]] = [[] for _ in range(size)]
    for index in sorted(range(len(refs)), key=lambda i: -refs[i].num_tokens):
        length = refs[index].num_tokens
        least = loads.index(min(loads))
        loads[least] += length
        place = next((i for i, used in enumerate(filled[least]) if used + length <= tokens), None)
        if place is None:
            rows[least].append([index])
            filled[least].append(length)
        else:
            rows[least][place].append(index)
            filled[least][place] += length
    most = max(map(len, rows))
    return rows[rank] + [[] for _ in range(most - len(rows[rank]))]


def checked(sample: Sample) -> Sample:
    """Return `sample` if its states are finite; one that is not would end the run for all others."""
    for name, tensor in sample.tensors.items():
        if tensor.is_floating_point() and not all(bool(bound.isfinite()) for bound in tensor.aminmax()):
            raise SampleUnusable(f"{name} is not finite: the target overflowed on this prompt")
    return sample


def skipped_all(window: TrainingWindow, given_up: list[GivenUp], reason: str) -> list[GivenUp]:
    """Return `given_up` with the other samples of a window that no draft could be trained on: they are quarantined."""
    named = {item.sample_id for item in given_up}
    others = [ref.sample_id for ref in window.refs if ref.sample_id not in named]
    return given_up + [GivenUp(name, reason, lost=False) for name in others]
