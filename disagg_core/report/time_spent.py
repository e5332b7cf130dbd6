"""Where the time of a run went, on both sides: summed up from its metrics files, whatever way the run ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from disagg_core.report.document import TimeFigures
from disagg_core.run.bottleneck import Shares, finding_of
from disagg_core.run.metrics import read_metrics
from disagg_core.run.phases import (
    DATA_WAIT,
    PRODUCER_BESIDE,
    PRODUCER_PHASES,
    TRAINING_PHASES,
    seconds_of,
    shares_of,
)
from disagg_core.run.plan import RunPlan

HEAD = ("side", "phase", "seconds", "share")


def time_spent(plan: RunPlan) -> TimeFigures | None:
    """Return where the time of a run went, over all its attempts; None where training took no step."""
    training, trained, _ = _summed(plan.dir.phases, TRAINING_PHASES)
    producer, captured, threads = _summed(plan.dir.rollout_metrics, (*PRODUCER_PHASES, *PRODUCER_BESIDE))
    if not trained:
        return None
    workers = {phase: producer.get(phase, 0.0) for phase in PRODUCER_PHASES}
    shares = Shares.of_sums(
        workers,
        training,
        infer_capacity=_capacity(captured, workers, ("space",), threads),
        train_capacity=_capacity(trained, training, DATA_WAIT, 1),
    )
    return TimeFigures(
        training=_rounded(training),
        producer=_rounded(workers),
        producer_beside=_rounded({phase: producer.get(phase, 0.0) for phase in PRODUCER_BESIDE}),
        bottleneck=finding_of(plan.spec, shares),
    )


def time_rows(time: TimeFigures) -> list[Sequence[str]]:
    """Return the table of shares, a row for each phase that took time, under `HEAD`."""
    rows: list[Sequence[str]] = []
    sides: tuple[tuple[str, Mapping[str, str], Mapping[str, float]], ...] = (
        ("training", TRAINING_PHASES, time.training),
        ("capture", PRODUCER_PHASES, time.producer),
    )
    for side, labels, seconds in sides:
        shares = shares_of(seconds)
        rows += [
            (side, label, f"{seconds[phase]:.1f}", f"{shares.get(phase, 0.0):.1%}")
            for phase, label in labels.items()
            if seconds.get(phase, 0.0) > 0
        ]
    rows += [
        ("beside capture", PRODUCER_BESIDE[phase], f"{seconds:.1f}", "")
        for phase, seconds in time.producer_beside.items()
        if seconds > 0
    ]
    return rows


def _summed(path: Path, phases: Iterable[str]) -> tuple[dict[str, float], int, int]:
    """Return the seconds of each phase in a metrics file, the samples, and how many workers spent the seconds."""
    wanted = tuple(phases)
    sums = dict.fromkeys(wanted, 0.0)
    samples, workers = 0.0, 1.0
    for record in read_metrics(path):
        for phase, seconds in seconds_of(record, wanted).items():
            sums[phase] += seconds
        count, threads = record.get("samples"), record.get("workers")
        samples += count if isinstance(count, (int, float)) else 0.0
        workers = threads if isinstance(threads, (int, float)) else workers
    return sums, round(samples), round(workers)


def _capacity(samples: int, seconds: Mapping[str, float], idle: Iterable[str], parallel: int) -> float | None:
    busy = (sum(seconds.values()) - sum(seconds.get(phase, 0.0) for phase in idle)) / parallel
    return samples / busy if busy > 0 else None


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {phase: round(value, 3) for phase, value in seconds.items()}
