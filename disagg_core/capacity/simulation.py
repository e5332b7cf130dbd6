"""A discrete-event simulation of the pipeline that drives its real flow control.

Time, captures, transfers and steps are simulated. What decides is the code that runs: `FlowControl` under `Watermarks`
admits prompts, `ReorderBuffer` publishes in order, `largest_group` bounds the groups. What a `Forecast` leaves out
shows here: samples of unlike length, windows that wait for their last sample, watermarks that are tight.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from disagg_core.capacity.model import Forecast
from disagg_core.rollout.flow_control import FlowControl
from disagg_core.rollout.pipeline import largest_group
from disagg_core.rollout.reorder import ReorderBuffer
from disagg_core.run.watermarks import Watermarks

_MARGIN = 0.2
"""Part of the samples at either end that rates leave out: the pipeline has to fill first, and runs empty at last."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is simulated. Seconds are of a sample of the mean length; those of others are in proportion.

    `slots` captures are under way at a time and take `capture_s` each; transfers into and out of the store pass one
    after another in `put_s` and `get_s`; a step takes `fixed_step_s` and `sample_step_s` for each of its samples.
    `spread` is the standard deviation of the logarithm of the lengths.
    """

    slots: int
    capture_s: float
    put_s: float
    get_s: float
    fixed_step_s: float
    sample_step_s: float
    sample_bytes: int
    marks: Watermarks
    prefetch_samples: int
    ordered: bool = True
    group: int = 1
    spread: float = 0.6

    @classmethod
    def of(cls, forecast: Forecast, marks: Watermarks, *, prefetch_samples: int, ordered: bool, at_once: int) -> Scene:
        """Return the scene of a forecast, in which every server captures `at_once` samples at a time."""
        stages, window = forecast.stages, forecast.global_batch
        slots = forecast.split.servers * at_once
        return cls(
            slots=slots,
            capture_s=slots / stages["capture"],
            put_s=1.0 / min(stages["put"], stages["store"], stages["channel"]),
            get_s=1.0 / min(stages["get"], stages["store"]),
            fixed_step_s=forecast.reduce_s,
            sample_step_s=(forecast.step_s - forecast.reduce_s) / window,
            sample_bytes=math.ceil(forecast.sample_bytes),
            marks=marks,
            prefetch_samples=prefetch_samples * forecast.split.groups,
            ordered=ordered,
        )


@dataclass
class Simulated:
    """What came of a simulation: the rate, the shares of time that each side waited, and the most that was in flight.

    `space` is the share of the slots' time, `refs` and `features` are those of the trainer's.
    """

    samples_per_s: float
    space: float
    refs: float
    features: float
    most_refs: int
    most_bytes: int
    pauses: int


class Simulation:
    """One run of a scene, from its first prompt to its last step."""

    def __init__(self, scene: Scene, *, samples: int, seed: int = 0) -> None:
        """`samples` are rounded down to whole windows."""
        self._scene, self._marks = scene, scene.marks
        self._total = samples // scene.marks.window * scene.marks.window
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._flow = FlowControl(scene.marks, lambda: self.now)
        self._reorder: ReorderBuffer[int] = ReorderBuffer(ordered=scene.ordered)
        self._group = largest_group(scene.marks, scene.group)
        self._lengths = _lengths(self._total, scene.spread, seed)
        self._capture = _Capture()
        self._store_in, self._store_out = _Link(), _Link()
        self._trainer = _Trainer()
        self._most_refs = self._most_bytes = 0

    def run(self) -> Simulated:
        """Run to the end.

        Raises:
            RuntimeError: the flow control let both sides wait for each other for ever.
        """
        self._capture.idle = [(0.0, slot) for slot in range(self._scene.slots)]
        self._admit()
        self._trainer.idle_since = 0.0
        while self._events:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
        trainer = self._trainer
        if trainer.trained != self._total:
            raise RuntimeError(f"expected {self._total} trained samples, found {trainer.trained}: both sides wait")
        spent = trainer.until - trainer.since
        return Simulated(
            samples_per_s=trainer.counted / spent,
            space=self._capture.waited_s / (self._scene.slots * spent),
            refs=trainer.waited_refs_s / spent,
            features=trainer.waited_features_s / spent,
            most_refs=self._most_refs,
            most_bytes=self._most_bytes,
            pauses=self._flow.pauses,
        )

    def _after(self, seconds: float, happen: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, happen))

    def _bytes(self, ordinal: int) -> int:
        size = math.ceil(self._scene.sample_bytes * self._lengths[ordinal])
        return min(size, self._marks.max_sample_bytes) if self._marks.max_sample_bytes else size

    # --- capture ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let idle slots take groups of prompts, as long as the flow control has room for them."""
        capture = self._capture
        while capture.idle and capture.next < self._total:
            size = min(self._group, self._total - capture.next)
            if not self._flow.may_admit(self._group, capture.admitted_refs, capture.admitted_bytes):
                return
            since, slot = capture.idle.pop(0)
            if self._trainer.measured:
                capture.waited_s += self.now - max(since, self._trainer.since)
            group = list(range(capture.next, capture.next + size))
            capture.next += size
            for ordinal in group:
                self._reorder.expect(ordinal)
                capture.admitted_refs += 1
                capture.admitted_bytes += self._bytes(ordinal)
            self._most_refs = max(self._most_refs, capture.admitted_refs)
            self._most_bytes = max(self._most_bytes, capture.admitted_bytes)
            took = self._scene.capture_s * sum(self._lengths[ordinal] for ordinal in group)
            self._after(took, partial(self._captured, group, slot))

    def _captured(self, group: list[int], slot: int) -> None:
        for ordinal in group:
            done_at = self._store_in.take(self.now, self._scene.put_s * self._lengths[ordinal])
            self._after(done_at - self.now, partial(self._stored, ordinal))
        self._capture.idle.append((self.now, slot))
        self._admit()

    def _stored(self, ordinal: int) -> None:
        self._reorder.put(ordinal, ordinal)
        self._trainer.published.extend(self._reorder.pop_ready(self._total))
        self._fetch()

    # --- training --------------------------------------------------------------------------------------------------

    def _fetch(self) -> None:
        """Fetch the windows that may be fetched: the next one, and as many ahead as the loader's bound allows."""
        trainer, window = self._trainer, self._marks.window
        while len(trainer.published) >= window:
            ahead = window * max(0, len(trainer.fetched))
            if trainer.fetched and ahead > self._scene.prefetch_samples:
                return
            refs = [trainer.published.popleft() for _ in range(window)]
            ends = [self._store_out.take(self.now, self._scene.get_s * self._lengths[ordinal]) for ordinal in refs]
            trainer.fetched.append((max(ends), refs))
            if len(trainer.fetched) == 1:
                self._await_first()

    def _await_first(self) -> None:
        """Begin the next step when its window is there, if the trainer is idle."""
        trainer = self._trainer
        if trainer.busy or not trainer.fetched:
            return
        trainer.busy = True
        there_at, refs = trainer.fetched[0]
        if trainer.measured:
            trainer.waited_refs_s += self.now - trainer.idle_since
            trainer.waited_features_s += max(0.0, there_at - self.now)
        self._after(max(0.0, there_at - self.now), partial(self._step, refs))

    def _step(self, refs: list[int]) -> None:
        self._trainer.fetched.popleft()
        self._fetch()
        work = sum(self._lengths[ordinal] for ordinal in refs) * self._scene.sample_step_s
        self._after(self._scene.fixed_step_s + work, partial(self._trained, refs))

    def _trained(self, refs: list[int]) -> None:
        trainer, capture = self._trainer, self._capture
        trainer.trained += len(refs)
        trainer.busy, trainer.idle_since = False, self.now
        capture.admitted_refs -= len(refs)
        capture.admitted_bytes -= sum(map(self._bytes, refs))
        if trainer.measured:
            trainer.counted, trainer.until = trainer.counted + len(refs), self.now
        elif trainer.counted == 0:
            trainer.since = self.now
        trainer.measured = _MARGIN * self._total <= trainer.trained <= (1 - _MARGIN) * self._total
        self._admit()
        self._fetch()
        self._await_first()


@dataclass
class _Capture:
    """The capture side: idle slots with the time since when, the next prompt, and what is admitted or in flight."""

    idle: list[tuple[float, int]] = field(default_factory=list)
    next: int = 0
    admitted_refs: int = 0
    admitted_bytes: int = 0
    waited_s: float = 0.0


@dataclass
class _Trainer:
    """The training side: what is published and not fetched, what is fetched with the time when it is there."""

    published: deque[int] = field(default_factory=deque)
    fetched: deque[tuple[float, list[int]]] = field(default_factory=deque)
    busy: bool = False
    idle_since: float = 0.0
    trained: int = 0
    measured: bool = False
    since: float = 0.0
    until: float = 0.0
    counted: int = 0
    waited_refs_s: float = 0.0
    waited_features_s: float = 0.0


@dataclass
class _Link:
    """A link that carries one transfer after another."""

    free_at: float = 0.0

    def take(self, now: float, seconds: float) -> float:
        """Return when a transfer of so many seconds ends that is asked for now."""
        self.free_at = max(self.free_at, now) + seconds
        return self.free_at


def _lengths(count: int, spread: float, seed: int) -> list[float]:
    """Return log-normal lengths as parts of their mean, which is 1."""
    draw = random.Random(seed)
    return [math.exp(draw.gauss(-spread * spread / 2, spread)) for _ in range(count)]
