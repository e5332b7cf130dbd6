"""From samples that arrived to batches on the device, in a thread of its own, while the window before is trained.

A window's samples are checked and collated for each draft, on a GPU into pinned memory, and copied on a stream of their
own. The step waits, on the device, for the copy of what it computes with and for nothing else. One window is staged
at a time: the next one to be trained. What of a window does not fit `DEVICE_BYTES` stays in pinned memory and is copied
by the step, without waiting.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from disagg_core.contracts import SampleRef
from disagg_core.drafts.method import Sample
from disagg_core.errors import SampleLost, SampleUnusable
from disagg_core.training.inputs import DraftInput
from disagg_core.training.window import GivenUp, TrainingWindow, checked

DEVICE_BYTES = 4 * 1024**3
"""Bytes of a staged window that are copied to the device before its step."""
POLL_S = 0.5
"""Who waits for references or samples looks this often whether to stop."""
HANDOVER_S = 0.0002
"""A thread that is busy with Python's own work lets another one go on after so long, not after 5 ms."""
_log = logging.getLogger(__name__)


def let_the_step_go_first() -> None:
    """Have threads that fetch and stage keep the one that trains waiting for less: see `HANDOVER_S`.

    For programs that train and do nothing else: it is a setting of the whole process.
    """
    sys.setswitchinterval(HANDOVER_S)


@dataclass
class PendingWindow:
    """A window on its way: its references, and the transfers of this rank's micro-batches."""

    refs: list[SampleRef]
    shares: list[list[tuple[SampleRef, Future[dict[str, Tensor]]]]]
    staged: Future[TrainingWindow] | None = field(default=None)

    def transfers(self) -> list[Future[dict[str, Tensor]]]:
        """Return all transfers."""
        return [future for share in self.shares for _ref, future in share]

    def work(self) -> list[Future[Any]]:
        """Return all transfers, and staging itself, which has begun."""
        assert self.staged is not None
        return [*self.transfers(), self.staged]

    def staged_window(self) -> TrainingWindow:
        """Return the window with its batches, which are made."""
        assert self.staged is not None
        return self.staged.result()

    def unfinished(self) -> int:
        """Return how much of its work is not done."""
        return sum(not future.done() for future in self.work())

    def broken(self) -> BaseException | None:
        """Return what a transfer ended with, of those that are done, if it is no fault of its one sample."""
        errors = (future.exception() for future in self.transfers() if future.done() and not future.cancelled())
        return next((e for e in errors if e is not None and not isinstance(e, (SampleLost, SampleUnusable))), None)


def refused(item: GivenUp) -> Future[dict[str, Tensor]]:
    """Return what stands for the transfer of a sample that is given up before it is fetched."""
    transfer: Future[dict[str, Tensor]] = Future()
    transfer.set_exception(SampleLost(item.reason) if item.lost else SampleUnusable(item.reason))
    return transfer


class Stager:
    """Makes the batches of windows for `inputs` on `device`, one window after the other, in the order asked for."""

    def __init__(self, inputs: Sequence[DraftInput], device: torch.device) -> None:
        self._inputs = inputs
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="staging")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._closed = False

    def stage(self, window: PendingWindow) -> Future[TrainingWindow]:
        """Begin to make the batches of `window`, unless that was begun before; return what has the result."""
        if window.staged is None:
            window.staged = self._thread.submit(self._made, window)
        return window.staged

    def close(self) -> None:
        """Begin nothing any more, and end a wait for samples; what is being made is dropped."""
        self._closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _made(self, pending: PendingWindow) -> TrainingWindow:
        while wait(pending.transfers(), POLL_S).not_done:
            if self._closed:
                raise CancelledStaging
        own = [ref for share in pending.shares for ref, _future in share]
        window = TrainingWindow(pending.refs, own, [reads.begin() for reads in self._inputs])
        for share in pending.shares:
            samples = _usable(share, window.given_up)
            window.tokens += sum(len(sample) for sample in samples)
            for reads, batches in zip(self._inputs, window.drafts, strict=True):
                reads.add(batches, samples, pin=self._stream is not None)
        if self._stream is not None:
            self._copy(window, self._stream)
        pending.shares = []  # the samples' memory goes back to the store: the batches have copies
        return window

    def _copy(self, window: TrainingWindow, stream: torch.cuda.Stream) -> None:
        """Copy batches to the device on `stream`, and have each draft's note when that is done."""
        left = DEVICE_BYTES
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            for batches in window.drafts:
                left -= batches.copy_to(self._device, left)


class CancelledStaging(Exception):
    """A window was not staged because the loader was closed; nobody waits for it."""


def _usable(share: Sequence[tuple[SampleRef, Future[dict[str, Tensor]]]], given_up: list[GivenUp]) -> list[Sample]:
    """Return the samples of a micro-batch that can be trained on; the others are added to `given_up`."""
    samples = []
    for ref, future in share:
        try:
            samples.append(checked(Sample(ref.sample_id, future.result())))
        except (SampleLost, SampleUnusable) as error:
            _log.warning("sample %s weighs zero: %s", ref.sample_id, error)
            given_up.append(GivenUp(ref.sample_id, str(error), lost=isinstance(error, SampleLost)))
    return samples
