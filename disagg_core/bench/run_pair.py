"""Whether the two sides of a run overlap: its own target, prompts and drafts, each side alone and both at once.

The sides are the processes of a run, each on one half of the machine's cores, and every measurement has a run
directory and a part of the store of its own: what one has generated, captured or counted is not there for the next.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from disagg_core.bench.result import Figure, Result
from disagg_core.channel import StreamingRefQueue
from disagg_core.checks.preflight import sketch_plan
from disagg_core.errors import RoleFailed
from disagg_core.roles.connections import open_channel, open_store
from disagg_core.run.outcomes import read_outcome
from disagg_core.run.plan import RoleAssignment, RunPlan
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import get_settings
from disagg_core.store import managed_store
from disagg_core.store.endpoints import StoreEndpoints

Role = Literal["producer", "consumer"]

_SPARE = 32 << 20


def bench_run(document: Path, *, samples: int = 480) -> Result:
    """Measure capture alone, training alone and both at once with the first `samples` prompts of a run's document.

    Raises:
        BadInput: the document cannot be planned.
        RoleFailed: a side of it ended with an error; see its message.
    """
    plan = sketch_plan(load_spec(document, [f"data.limit={samples}"]), get_settings())
    capacity = int(1.2 * samples * plan.max_sample_bytes) + _SPARE
    with (
        tempfile.TemporaryDirectory() as folder,
        managed_store(capacity, log_dir=Path(folder) / "logs") as endpoints,
    ):
        capture = _capture_alone(_placed(plan, Path(folder), "capture", endpoints))
        training = _training_alone(_placed(_boundless(plan, samples), Path(folder), "training", endpoints))
        pair = _together(_placed(plan, Path(folder), "pair", endpoints))
    slower = min(capture, training["samples_per_second"])
    together = pair["samples_per_second"]
    figures = [
        Figure("training alone", training["samples_per_second"], "samples/s"),
        Figure("capture alone", capture, "samples/s", capture / training["samples_per_second"], "training"),
        Figure(
            "both at once",
            together,
            "samples/s",
            together / slower,
            "the slower side alone",
            ">= 0.95",
            together >= 0.95 * slower,
        ),
        Figure("training waits, both at once", 100 * pair["data_wait_s"] / pair["seconds"], "%"),
    ]
    methods = " and ".join(draft.section.method for draft in plan.drafts)
    text = (
        f"{methods} for {Path(plan.target.model).name} of {document.name}, {samples} prompts in windows of "
        f"{plan.spec.global_batch_size}; each side on {len(_cores('consumer'))} of {os.cpu_count()} cores"
    )
    return Result("pipeline", text, figures)


def _capture_alone(assignment: RoleAssignment) -> float:
    """Return the samples a second of a producer whose samples are freed as they come."""
    window = assignment.plan.spec.global_batch_size
    with open_store(assignment) as store, open_channel(assignment) as channel, _running("producer", assignment):
        queue, freed, began, last = StreamingRefQueue(channel), 0, 0.0, 0.0
        while refs := queue.get(window):
            began = began or time.perf_counter()
            store.release_many(refs)
            queue.ack(refs)
            freed, last = freed + len(refs), time.perf_counter()
        channel.finish("end of stream")
    return (freed - window) / (last - began)


def _training_alone(assignment: RoleAssignment) -> Mapping[str, Any]:
    """Return the outcome of training on samples that are all in the store already."""
    with _running("producer", assignment):
        pass
    with _running("consumer", assignment):
        pass
    return _result_of(assignment)


def _together(assignment: RoleAssignment) -> Mapping[str, Any]:
    with _running("producer", assignment), _running("consumer", assignment):
        pass
    return _result_of(assignment)


def _placed(plan: RunPlan, folder: Path, name: str, endpoints: StoreEndpoints) -> RoleAssignment:
    own = plan.model_copy(update={"run_id": f"bench-{name}", "root": folder / name})
    return RoleAssignment(plan=own, attempt=1, store=endpoints)


def _boundless(plan: RunPlan, samples: int) -> RunPlan:
    """Return `plan` without backpressure: nobody reads while its producer runs."""
    marks = replace(plan.watermarks, high_refs=2 * samples, low_refs=None, high_bytes=None, low_bytes=None)
    return plan.model_copy(update={"watermarks": marks})


def _result_of(assignment: RoleAssignment) -> Mapping[str, Any]:
    outcome = read_outcome(_outcome_path(assignment, "consumer"))
    assert outcome is not None
    return outcome.result


def _outcome_path(assignment: RoleAssignment, role: Role) -> Path:
    return assignment.dir.state / f"{role}-outcome.json"


@contextlib.contextmanager
def _running(role: Role, assignment: RoleAssignment) -> Iterator[None]:
    """Run one side in a process of its own; on leaving, wait for its end.

    Raises:
        RoleFailed: it failed.
    """
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(role, assignment))
    process.start()
    try:
        yield
        process.join()
    finally:
        process.kill()
        process.join()
    _check(role, assignment, process)


def _check(role: Role, assignment: RoleAssignment, process: BaseProcess) -> None:
    if process.exitcode:
        outcome = read_outcome(_outcome_path(assignment, role))
        why = f"exit code {process.exitcode}" if outcome is None else outcome.message
        raise RoleFailed(f"the {role} of {assignment.plan.run_id} failed: {why}")


def _run(role: Role, assignment: RoleAssignment) -> None:
    os.sched_setaffinity(0, _cores(role))
    if role == "producer":
        from disagg_core.roles.producer import run_producer

        run_producer(assignment)
    else:
        from disagg_core.roles.consumer import run_consumer

        run_consumer(assignment)


def _cores(role: Role) -> set[int]:
    """Return the cores of one side: half of those that this process may use, or the only one."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    return set(cores[:half] if role == "producer" and half else cores[half:])
