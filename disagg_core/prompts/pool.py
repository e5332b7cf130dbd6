"""All prompts of a run by ordinal: which record stands where in the seeded order, encoded when asked for.

An ordinal counts over all epochs. With n prompts an epoch, ordinal o is place ``o % n`` of epoch ``o // n``; each epoch
has its own permutation of the same prompts. Held-out prompts are the last of a permutation fixed by the run's seed
(without shuffle: the last of the file), so that they are the same in every epoch and attempt; `data.limit` keeps the
first of the same permutation. A record that asks the same as a held-out prompt is rejected, wherever it stands.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from disagg_core.contracts import PromptTask
from disagg_core.errors import PromptError, PromptRejected
from disagg_core.ordinals import OrdinalSet
from disagg_core.prompts.bad_records import BadRecord, BadRecords
from disagg_core.prompts.encode import PromptEncoder
from disagg_core.prompts.files import HF_PREFIX, DatasetName, DatasetStream
from disagg_core.prompts.json_values import RecordError
from disagg_core.prompts.order import SeededPermutation, seed_of
from disagg_core.prompts.pinned import DataChanged, PinnedData, PinnedFile, PinnedStream
from disagg_core.prompts.record_files import RecordFile, open_records
from disagg_core.prompts.records import parse_record
from disagg_core.prompts.shapes import Record, prompt_key
from disagg_core.run_spec.document import DataSection, RunSpec
from disagg_core.target.facts import TargetFacts

log = logging.getLogger(__name__)

_BASE_ORDER, _EPOCH_ORDER = 1, 2
_HELD_OUT_SHARE = 4
_JUDGED_AFTER = 256
"""Rows of a stream after which the share of those that cannot be used says something."""


@dataclass(frozen=True)
class RejectedPrompt:
    """A prompt that cannot be trained on: where it stands and why."""

    source: str
    reason: str


class PromptPool(Protocol):
    """Prompts by ordinal. `task` may be called from several threads."""

    @property
    def end(self) -> int | None:
        """How many ordinals there are over all epochs; None until a stream of unknown length has ended once."""
        ...

    @property
    def missing(self) -> OrdinalSet:
        """Ordinals below `end` that stand for no prompt."""
        ...

    def task(self, ordinal: int) -> PromptTask | RejectedPrompt | None:
        """Return the prompt at `ordinal`, the reason why it cannot be used, or None beyond the end."""
        ...

    def close(self) -> None:
        """Close files."""
        ...


class GivenTasks:
    """A pool of tasks that are at hand already, for embedding and tests. Their ordinals must differ."""

    def __init__(self, tasks: Sequence[PromptTask]) -> None:
        self._tasks = {task.ordinal: task for task in tasks}
        if len(self._tasks) != len(tasks):
            raise ValueError(f"expected {len(tasks)} different ordinals, found {len(self._tasks)}")

    @property
    def end(self) -> int:
        """One more than the highest ordinal."""
        return max(self._tasks, default=-1) + 1

    @property
    def missing(self) -> OrdinalSet:
        """Ordinals that none of the tasks has."""
        holes = OrdinalSet()
        for ordinal in range(self.end):
            if ordinal not in self._tasks:
                holes.add(ordinal)
        return holes

    def task(self, ordinal: int) -> PromptTask | None:
        """Return the task at `ordinal`."""
        return self._tasks.get(ordinal)

    def close(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Placed:
    """One raw record, or what keeps it from being read, and where it was found (``file:line``)."""

    raw: Any
    source: str

    @classmethod
    def of(cls, file: RecordFile, index: int) -> Placed:
        """Return the record at `index` of `file`."""
        source = file.where(index)
        try:
            return cls(file.read(index), source)
        except RecordError as error:
            return cls(error, source)


def held_out_count(spec: RunSpec, rows: int) -> int:
    """Return how many of `rows` prompts are kept out of training to measure drafts with: at most a quarter of them."""
    return 0 if spec.data.holdout is not None else min(spec.held_out_prompts, rows // _HELD_OUT_SHARE)


class FileOrder:
    """The seeded order over the records of a file or folder."""

    def __init__(self, spec: RunSpec, file: RecordFile) -> None:
        self.file = file
        self._shuffle = spec.data.shuffle
        self._seed = spec.run.seed
        self._base = SeededPermutation(len(file), seed_of(self._seed, _BASE_ORDER))
        self.held_out = held_out_count(spec, len(file))
        usable = len(file) - self.held_out
        self.per_epoch: int = min(usable, spec.data.limit or usable)
        self._epoch: tuple[int, SeededPermutation] | None = None

    @property
    def expected(self) -> int:
        """How many prompts an epoch has."""
        return self.per_epoch

    def place(self, epoch: int, position: int) -> Placed | None:
        """Return the record at `position` of `epoch`; None beyond its end."""
        if position >= self.per_epoch:
            return None
        if self._shuffle:
            current = self._epoch  # once: another thread may be in another epoch and replace it
            if current is None or current[0] != epoch:
                current = (epoch, SeededPermutation(self.per_epoch, seed_of(self._seed, _EPOCH_ORDER, epoch)))
                self._epoch = current
            position = current[1][position]
        return self._at(position)

    def _at(self, position: int) -> Placed:
        return Placed.of(self.file, self._base[position] if self._shuffle else position)

    def held_out_records(self) -> list[Placed]:
        """Return the records that are kept out of training."""
        size = len(self.file)
        return [self._at(position) for position in range(size - self.held_out, size)]

    @property
    def pin(self) -> PinnedFile:
        """What is read of the file."""
        return self.file.pin

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class StreamOrder:
    """The seeded order of a streamed dataset; the first rows are held out, the others go through a shuffle buffer."""

    def __init__(self, spec: RunSpec, stream: DatasetStream) -> None:
        self.stream = stream
        self._shuffle = spec.data.shuffle
        self._seed = seed_of(spec.run.seed, _EPOCH_ORDER)
        self._limit = spec.data.limit
        # The first rows are held out, because a stream does not know its last. So many are read to see whether a
        # quarter of all the rows is as many as wanted.
        self._first = self.stream.first(spec.held_out_prompts * _HELD_OUT_SHARE)
        self.held_out = held_out_count(spec, len(self._first))
        self.per_epoch: int | None = None
        """Known once an epoch has been read to its end: what a dataset's card says may not be what it has."""

    @property
    def expected(self) -> int | None:
        """How many prompts an epoch has by the dataset's card, if it says."""
        rows = self.stream.rows
        return None if rows is None else min(rows - self.held_out, self._limit or rows)

    def place(self, epoch: int, position: int) -> Placed | None:
        """Return the record at `position` of `epoch`; None beyond its end, which is known from then on.

        With `data.limit` every epoch has the same rows: the first ones of epoch 0's order.
        """
        if self._limit is not None:
            epoch = 0  # another epoch's shuffle would bring other rows to the front
        if self.per_epoch is not None and position >= self.per_epoch:
            return None
        if self._limit is not None and position >= self._limit:
            self.per_epoch = self._limit
            return None
        row = self.stream.read(epoch, position, seed=self._seed, skip=self.held_out, shuffle=self._shuffle)
        if row is None:
            self.per_epoch = self.stream.ended_at
            return None
        return Placed(row, f"{self.stream.name.name}:{epoch}:{position}")

    def held_out_records(self) -> list[Placed]:
        """Return the records that are kept out of training."""
        rows = self._first[: self.held_out]
        return [Placed(row, f"{self.stream.name.name}:{number}") for number, row in enumerate(rows)]

    @property
    def pin(self) -> PinnedStream:
        """Which revision of the dataset is read."""
        return self.stream.pin

    def close(self) -> None:
        """Let go of the stream."""
        self.stream.close()


def open_order(spec: RunSpec, pinned: PinnedData | None = None) -> FileOrder | StreamOrder:
    """Open the prompts of `spec` in their seeded order.

    Raises:
        PromptError: they are missing or empty.
        DataChanged: they are not what was `pinned`.
    """
    known = pinned.prompts if pinned is not None else None
    if spec.data.prompts.startswith(HF_PREFIX):
        assert not isinstance(known, PinnedFile)
        return StreamOrder(spec, DatasetStream(DatasetName.parse(spec.data.prompts), known))
    assert not isinstance(known, PinnedStream)
    return FileOrder(spec, open_records(Path(spec.data.prompts).expanduser(), spec.data, known))


def parse_placed(placed: Placed, data: DataSection) -> Record:
    """Return the record of `placed` in its plain shape.

    Raises:
        BadRecord: it cannot be used; file, line and what is wrong are named.
    """
    try:
        if isinstance(placed.raw, RecordError):
            raise placed.raw
        return parse_record(placed.raw, data.format, data.fields)
    except RecordError as error:
        raise BadRecord(placed.source, str(error)) from error


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts of a run, each with where it stands; `pin` is that of their file if they have their own."""

    records: list[tuple[str, Record]]
    pin: PinnedFile | None


def read_held_out(spec: RunSpec, order: FileOrder | StreamOrder, pinned: PinnedData | None = None) -> HeldOut:
    """Return the held-out prompts of a run, from `data.holdout` or kept out of the prompts.

    Records that cannot be used are left out.

    Raises:
        PromptError: the holdout file is missing, or has more records of no use than the run document allows.
        DataChanged: the holdout file is not what was `pinned`.
    """
    pin = None
    if spec.data.holdout is None:
        placed = order.held_out_records()
    else:
        known = pinned.holdout if pinned is not None else None
        file = open_records(Path(spec.data.holdout).expanduser(), spec.data, known)
        placed = [Placed.of(file, index) for index in range(len(file))]
        pin = file.pin
        file.close()
    return HeldOut(_usable(spec, placed), pin)


def _usable(spec: RunSpec, placed: Sequence[Placed]) -> list[tuple[str, Record]]:
    records: list[tuple[str, Record]] = []
    bad = BadRecords(spec.data, str(spec.data.holdout))
    for item in placed:
        try:
            records.append((item.source, parse_placed(item, spec.data)))
        except BadRecord as error:
            log.warning("not held out: %s", error)
            if spec.data.holdout is not None:
                bad.take(error)
    bad.check(len(placed))
    return records


class EncodedPrompts:
    """The pool of a run document: records by the seeded order, encoded with the target's tokenizer.

    Raises:
        PromptError: the prompts are missing, empty or broken.
        DataChanged: they are not what was `pinned`.
    """

    def __init__(
        self,
        spec: RunSpec,
        tokenizer: Any,
        pinned: PinnedData | None = None,
        facts: TargetFacts | None = None,
    ) -> None:
        self.order = open_order(spec, pinned)
        self.encoder = PromptEncoder(spec, tokenizer, facts)
        self._data: DataSection = spec.data
        self._bad = BadRecords(spec.data, spec.data.prompts)
        self._seen = 0
        # By what they ask, not by place: the same prompt may stand in the data twice.
        self._held_out = {prompt_key(record) for _, record in read_held_out(spec, self.order, pinned).records}

    @property
    def end(self) -> int | None:
        """Prompts of an epoch times epochs, once known."""
        per_epoch = self.order.per_epoch
        return None if per_epoch is None else per_epoch * self._data.epochs

    @property
    def missing(self) -> OrdinalSet:
        """None: every ordinal has a record."""
        return OrdinalSet()

    def task(self, ordinal: int) -> PromptTask | RejectedPrompt | None:
        """Return the prompt at `ordinal`, the reason why it cannot be used, or None beyond the end.

        Raises:
            PromptError: a stream has more records that cannot be used than the run document allows.
        """
        placed = self._place(ordinal)
        if placed is None:
            return None
        self._seen += 1
        try:
            record = parse_placed(placed, self._data)
            if self._held_out and prompt_key(record) in self._held_out:
                return RejectedPrompt(placed.source, "asks the same as a held-out prompt")
            encoded = self.encoder.encode(record)
        except DataChanged:
            raise  # no fault of this one prompt
        except BadRecord as error:
            self._count(error)
            return RejectedPrompt(placed.source, error.reason)
        except (PromptError, PromptRejected) as error:
            return RejectedPrompt(placed.source, str(error))
        return PromptTask(
            ordinal=ordinal, source=placed.source, input_ids=encoded.input_ids, loss_mask=encoded.loss_mask
        )

    def _count(self, error: BadRecord) -> None:
        """Count a record of a stream that cannot be used; of a file, the checks have looked at every one."""
        if isinstance(self.order, StreamOrder):
            self._bad.take(error)
            if self._seen >= _JUDGED_AFTER:
                self._bad.check(self._seen)

    def _place(self, ordinal: int) -> Placed | None:
        per_epoch = self.order.per_epoch
        if per_epoch is None:
            # Nobody knows yet where epoch 0 ends. Reading beyond its end is what tells, and only then can the ordinal
            # be one of a later epoch.
            placed = self.order.place(0, ordinal)
            per_epoch = self.order.per_epoch
            if placed is not None or per_epoch is None:
                return placed
        if ordinal >= per_epoch * self._data.epochs:
            return None
        return self.order.place(*divmod(ordinal, per_epoch))

    def close(self) -> None:
        """Close the file or stream."""
        self.order.close()
