"""Splits the time of a training step into phases, without a remainder and without stopping the device.

The trainer says which phase it enters; until it enters another one, time belongs to that phase. On the CPU a mark is a
reading of the clock. On a GPU it is an event in the stream: the seconds between two marks are the stream's, so that a
wait counts only as far as the GPU had nothing left to do. Events are read when the device has passed them, one step
late or later, and nothing waits for that.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from disagg_core.run.phases import TrainingPhase

_BACKLOG = 64
"""Steps whose events are kept until the device has passed them; older ones are dropped."""


class Marks(Protocol):
    """How moments are marked and the time between them is told."""

    def mark(self) -> Any:
        """Mark this moment."""
        ...

    def passed(self, mark: Any) -> bool:
        """Whether the device has come to `mark`."""
        ...

    def between(self, first: Any, second: Any) -> float:
        """Return the seconds between two marks that were passed."""
        ...


class ClockMarks:
    """Marks of a device whose work is done when the call returns: readings of `clock`, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.mark = clock

    def passed(self, mark: float) -> bool:
        """Every moment that was marked is past."""
        return True

    def between(self, first: float, second: float) -> float:
        """Return the seconds between two readings."""
        return second - first


class EventMarks:
    """Marks in the current CUDA stream."""

    def mark(self) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        """Whether the stream has passed it."""
        return bool(mark.query())  # type: ignore[no-untyped-call]

    def between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        """Return the stream's seconds between two events."""
        return float(first.elapsed_time(second)) / 1e3


@dataclass(frozen=True)
class Lap:
    """One window: from the wait for it to the end of all that followed its step, and the seconds of each phase."""

    step: int
    samples: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class _Open:
    step: int
    samples: int
    marks: list[tuple[TrainingPhase, Any]]
    end: Any


class PhaseClock:
    """Tells the time that each phase of each window took. One thread uses it."""

    def __init__(self, device: torch.device | None = None, *, marks: Marks | None = None) -> None:
        cuda = device is not None and device.type == "cuda"
        self._marks: Marks = marks or (EventMarks() if cuda else ClockMarks())
        self._entered: list[tuple[TrainingPhase, Any]] = []
        self._laps: deque[_Open] = deque(maxlen=_BACKLOG)

    def enter(self, phase: TrainingPhase) -> None:
        """Begin `phase`; the one before ends."""
        if not self._entered or self._entered[-1][0] != phase:
            self._entered.append((phase, self._marks.mark()))

    def restart(self) -> None:
        """Forget what was entered since the last lap: the time until the first window is nobody's step."""
        self._entered.clear()
        self.enter("other")

    def lap(self, step: int, *, samples: int) -> None:
        """End the window that became optimizer step `step`; the phase that runs goes on in the next one."""
        if not self._entered:
            return
        end = self._marks.mark()
        self._laps.append(_Open(step, samples, self._entered, end))
        self._entered = [(self._entered[-1][0], end)]

    def finished(self) -> Iterator[Lap]:
        """Yield the laps that the device has come to the end of, oldest first, each once."""
        while self._laps and self._marks.passed(self._laps[0].end):
            lap = self._laps.popleft()
            seconds: dict[str, float] = {}
            ends = [mark for _, mark in lap.marks[1:]] + [lap.end]
            for (phase, mark), end in zip(lap.marks, ends, strict=True):
                seconds[phase] = seconds.get(phase, 0.0) + self._marks.between(mark, end)
            yield Lap(lap.step, lap.samples, seconds)

    def reduce_after(self, total: Tensor) -> None:
        """Enter ``reduce`` when the backward pass from `total` has computed its gradients.

        FSDP reduces them in a callback that it queues when its own hook sees the gradient of the module's output; a
        hook on `total`, which is computed from that output, runs before and queues its callback before.
        """
        engine = torch.autograd.Variable._execution_engine  # as FSDP and DDP do

        def queue(gradient: Tensor) -> None:
            engine.queue_callback(lambda: self.enter("reduce"))

        total.register_hook(queue)  # type: ignore[no-untyped-call]
