"""Captures the held-out samples that drafts are measured on while they are trained: once, before the stream begins.

They come from the end of the run's held-out prompts, of which the evaluation decodes the first, and are of no attempt:
an ordinal far beyond those of the stream names them, and none of them is published.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from disagg_core.contracts import PromptTask
from disagg_core.engines.contract import Captured, CaptureOutcome, Failed, Stored, Target
from disagg_core.errors import PromptError, PromptRejected
from disagg_core.prompts.pool import EncodedPrompts, read_held_out
from disagg_core.run.heldout import HeldOutFiles
from disagg_core.run.plan import RunPlan
from disagg_core.store import MooncakeFeatureStore

FIRST_ORDINAL = 1 << 40
"""The held-out samples are numbered from here: more than a stream has."""
_log = logging.getLogger(__name__)


def capture_held_out(
    plan: RunPlan,
    pool: EncodedPrompts,
    target: Target,
    store: MooncakeFeatureStore,
    files: HeldOutFiles,
    note: Callable[[int], None] = lambda done: None,
) -> None:
    """Have `target` capture the held-out samples of `plan` into `files`, unless they are there.

    `note` is told how many there are. A prompt that comes to nothing is left out.

    Raises:
        PromptError: none of them can be captured.
        TargetUnavailable: no server is usable.
    """
    if files.count:
        return
    tasks = held_out_tasks(plan, pool)
    if not files.write(_captured(tasks, target, store, note)):
        raise PromptError(
            f"training.heldout.prompts: expected some of {len(tasks)} held-out prompts to be captured, found none; the "
            "producer's log names why. Give other prompts in data.holdout, or remove training.heldout"
        )


def held_out_tasks(plan: RunPlan, pool: EncodedPrompts) -> list[PromptTask]:
    """Return the last `training.heldout.prompts` of the held-out prompts that can be encoded."""
    section = plan.spec.training.heldout
    assert section is not None
    tasks: list[PromptTask] = []
    records = read_held_out(plan.spec, pool.order, plan.data).records
    for number, (source, record) in reversed(list(enumerate(records))):
        if len(tasks) == section.prompts:
            break
        try:
            encoded = pool.encoder.encode(record)
        except (PromptError, PromptRejected) as error:
            _log.warning("%s is not measured on: %s", source, error)
            continue
        tasks.append(
            PromptTask(
                ordinal=FIRST_ORDINAL + number,
                source=source,
                input_ids=encoded.input_ids,
                loss_mask=encoded.loss_mask,
            )
        )
    return tasks


def _captured(
    tasks: Sequence[PromptTask], target: Target, store: MooncakeFeatureStore, note: Callable[[int], None]
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Yield (id, tensors) of each task that is captured, in their order."""
    size = target.batch_size
    for first in range(0, len(tasks), size):
        group = tasks[first : first + size]
        outcomes = {outcome.task.ordinal: outcome for outcome in target.capture(group, avoid={})}
        for task in group:
            tensors = _tensors_of(outcomes.get(task.ordinal), store)
            if tensors is not None:
                yield task.sample_id, tensors
        note(first + len(group))


def _tensors_of(outcome: CaptureOutcome | None, store: MooncakeFeatureStore) -> Mapping[str, Tensor] | None:
    match outcome:
        case Captured(tensors=tensors):
            return tensors
        case Stored(ref=ref):
            stored = store.get(ref)
            store.abort(ref)
            return stored
        case Failed(task=task, reason=reason):
            _log.warning("%s is not measured on: %s", task.source, reason)
    return None
