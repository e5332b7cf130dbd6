"""What a producer writes into the run's directory while it runs: rejected prompts, metrics, progress."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import msgspec

from disagg_core.engines.contract import Target
from disagg_core.files import LineFile
from disagg_core.rollout.meter import RolloutMeter
from disagg_core.rollout.pace import Pace
from disagg_core.rollout.producer import DriveState
from disagg_core.rollout.prompt_source import Rejection
from disagg_core.run.metrics import JsonlMetrics
from disagg_core.run.phases import PRODUCER_PHASES, RecentShares, seconds_of
from disagg_core.run.plan import RoleAssignment
from disagg_core.run.progress import ProgressFile, ProgressValue
from disagg_core.store import MooncakeFeatureStore
from disagg_core.store.transfers import PUT_TROUBLE

log = logging.getLogger(__name__)

_METRICS_S = 5.0


class RejectedFile:
    """The attempt's ``rejected.jsonl``: every prompt without a sample, and why; a restarted producer reads it.

    A prompt whose line is damaged is taken up again, and rejected again.
    """

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path)
        self.ordinals: set[int] = set()
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                self.ordinals.add(msgspec.json.decode(line, type=Rejection).ordinal)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                log.warning("%s, line %d cannot be read and is passed over: %s", path, number, error)

    def write(self, rejection: Rejection) -> None:
        """Append one prompt."""
        log.warning("%s: %s is %s: %s", rejection.source, rejection.ordinal, rejection.kind, rejection.reason)
        self._file.append(msgspec.json.encode(rejection))

    def __enter__(self) -> RejectedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Reporter:
    """Writes ``metrics/rollout.jsonl`` and ``state/producer.json`` as the drive goes.

    `covered` prompts were done by earlier attempts: with them, `prompts` in the progress counts up to the plan's total.
    The progress has the mean rate, because batches come in bursts, and the metrics have that of their interval.
    """

    def __init__(
        self,
        assignment: RoleAssignment,
        metrics: JsonlMetrics,
        progress: ProgressFile,
        target: Target,
        store: MooncakeFeatureStore,
        *,
        covered: int,
    ) -> None:
        self._total = assignment.plan.total_prompts
        self._covered = covered
        self._attempt = assignment.attempt
        self._metrics = metrics
        self._progress = progress
        self._target = target
        self._store = store
        self._written_at = time.monotonic()
        self._pace: Pace | None = None
        self._recent = RecentShares()

    def __call__(self, state: DriveState, meter: RolloutMeter) -> None:
        """Report; `meter` is read out at most every few seconds."""
        now = time.monotonic()
        fields: dict[str, float] = {}
        if now - self._written_at >= _METRICS_S or state.final:
            self._written_at = now
            fields = meter.interval()
            servers, counters = self._target.health(), self._store.counters
            self._metrics.write(
                attempt=self._attempt,
                published=state.published,
                rejected=state.rejected,
                in_flight=state.in_flight,
                queue_depth=sum(server.queue_depth for server in servers),
                servers_usable=sum(server.state == "closed" for server in servers),
                **{f"store_{name}": counters[name] for name in PUT_TROUBLE},
                **fields,
            )
        recent = self._of_late(fields) if fields else {}
        prompts = self._covered + state.published + state.rejected
        if self._pace is None:
            self._pace = Pace(begun=prompts)
        self._progress.update(
            phase="waiting for the consumer" if state.blocked else "capturing",
            prompts=prompts,
            total_prompts=self._total,
            published=state.published,
            published_bytes=state.published_bytes,
            rejected=state.rejected,
            in_flight=state.in_flight,
            blocked_s=round(state.blocked_s, 1),
            **self._pace.fields(prompts, self._total),
            **recent,
        )

    def _of_late(self, interval: dict[str, float]) -> dict[str, ProgressValue]:
        """Return where the time of the last minutes went, and what capture could do if it always had space."""
        phases: dict[str, float] = seconds_of(interval, PRODUCER_PHASES)
        self._recent.add(phases, samples=round(interval["samples"]))
        capacity = self._recent.rate_without(("space",), parallel=round(interval["workers"]))
        return {"tokens_per_s": interval["tokens_per_s"], "infer_capacity": capacity, **self._recent.fields()}
