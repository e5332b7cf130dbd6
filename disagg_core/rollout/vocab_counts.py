"""Counting the tokens that the draft vocabulary is chosen from: a step of the producer, before the first capture."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from disagg_core.contracts import PromptTask
from disagg_core.drafts.registry import method_of
from disagg_core.drafts.vocab import VocabMap, derive_vocab_map
from disagg_core.engines.contract import Failed, Generated, Target
from disagg_core.errors import BadInput, TargetUnavailable
from disagg_core.processes.retry import Retry
from disagg_core.prompts.pool import PromptPool
from disagg_core.run.plan import RunPlan

log = logging.getLogger(__name__)

_MOST_COUNTED = 50_000
"""Prompts that are counted at most: more change no frequency that matters, and a run must not wait for them."""

_REPORT_EVERY = 64
_AWAY_PAUSE_S = 0.5


def vocab_map_of(
    plan: RunPlan, pool: PromptPool, target: Target, *, cache: Path, progress: Callable[[int, int | None], None]
) -> VocabMap:
    """Return the run's vocabulary map: the one on disk, or a new one, which is saved.

    A draft with the target's whole vocabulary has the identity. Otherwise tokens are counted where the loss mask is 1:
    over the prompts of the first epoch, or, when the target generates, over its continuations of as many prompts as
    the draft's method asks for. A map of another run in the folder `cache` is taken if it was derived from the same
    target, tokenizer, prompts and settings. `progress` is told prompts counted so far and in all.

    Raises:
        BadInput: the file on disk is damaged, or nothing was left to count.
        TargetUnavailable: no server could continue the prompts for ``target.unavailable_timeout_s``.
    """
    if plan.dir.vocab_map.is_file():
        return VocabMap.load(plan.dir.vocab_map)
    generating = plan.spec.data.generate is not None
    limit = _sampled_prompts(plan) if generating else _MOST_COUNTED
    total = limit if pool.end is None else min(limit, pool.end)
    so_far = 0

    def waiting() -> None:
        progress(so_far, total)

    def samples() -> Iterator[tuple[Tensor, Tensor]]:
        rows = _continuations(plan, pool, target, waiting) if generating else _trained_tokens(pool)
        rows = itertools.islice(rows, total)
        first = next(rows, None)
        if first is None:
            raise BadInput("vocabulary map: expected at least one usable prompt to count tokens of, found none")
        for tokens in itertools.chain([first], rows):
            yield torch.tensor(tokens, dtype=torch.int64), torch.ones(len(tokens), dtype=torch.uint8)

    def report(counted: int) -> None:
        nonlocal so_far
        so_far = counted
        if counted % _REPORT_EVERY == 0 or counted == total:
            progress(counted, total)

    inputs = _inputs_version(plan)
    vocab_map = derive_vocab_map(
        cache / f"{inputs}.safetensors",
        samples,
        vocab_size=plan.target.vocab_size,
        draft_vocab_size=plan.draft_vocab_size,
        inputs_version=inputs,
        progress=report,
    )
    vocab_map.save(plan.dir.vocab_map)
    log.info("vocabulary map %s: %d of %d tokens", vocab_map.version, vocab_map.d2t.numel(), vocab_map.t2d.numel())
    return vocab_map


def _sampled_prompts(plan: RunPlan) -> int:
    """Return over how many prompts' continuations the draft's vocabulary is counted."""
    return method_of(plan.spec.draft.method).vocabulary(plan.spec.draft, plan.target).sampled_prompts


def _tasks(pool: PromptPool) -> Iterator[PromptTask]:
    ordinal = 0
    while (task := pool.task(ordinal)) is not None:
        if isinstance(task, PromptTask):
            yield task
        ordinal += 1


def _trained_tokens(pool: PromptPool) -> Iterator[list[int]]:
    for task in _tasks(pool):
        yield [token for token, live in zip(task.input_ids, task.loss_mask, strict=True) if live]


def _continuations(plan: RunPlan, pool: PromptPool, target: Target, waiting: Callable[[], None]) -> Iterator[list[int]]:
    """Yield continuations by the target, in prompt order but for the order within a batch."""
    together = max(target.batch_size, target.concurrency)
    batch: list[PromptTask] = []
    for task in _tasks(pool):
        batch.append(task)
        if len(batch) == together:
            yield from _generated(plan, target, batch, waiting)
            batch = []
    if batch:
        yield from _generated(plan, target, batch, waiting)


def _generated(
    plan: RunPlan, target: Target, batch: list[PromptTask], waiting: Callable[[], None]
) -> Iterator[list[int]]:
    """Yield the continuations of `batch`; wait for a target that is away, calling `waiting`, but not for ever."""
    left = {task.ordinal: task for task in batch}
    outcomes: Iterator[Generated | Failed] | None = None

    def next_outcome() -> Generated | Failed | None:
        nonlocal outcomes
        if outcomes is None:
            outcomes = iter(target.generate(list(left.values()), avoid={}))
        try:
            return next(outcomes, None)
        except TargetUnavailable:
            outcomes = None
            raise

    budget_s = plan.spec.target.unavailable_timeout_s
    patiently = Retry(TargetUnavailable, budget_s=budget_s, every_s=_AWAY_PAUSE_S, what="the target", on_wait=waiting)
    try:
        while left and (outcome := patiently(next_outcome)) is not None:
            del left[outcome.task.ordinal]
            if isinstance(outcome, Generated):
                yield outcome.tokens
            else:
                log.warning("prompt %d could not be continued: %s", outcome.task.ordinal, outcome.reason)
    except TargetUnavailable as error:
        raise TargetUnavailable(
            f"while counting for the vocabulary map of {plan.run_id}: {error}; waited for {budget_s:g} s "
            "(target.unavailable_timeout_s)"
        ) from error


def _inputs_version(plan: RunPlan) -> str:
    """Return a hash of what the counts depend on."""
    parts = (
        plan.target.version,
        plan.tokenizer_version,
        plan.spec.data.model_dump_json(),
        str(plan.spec.run.seed),
        str(_sampled_prompts(plan)),
        str(plan.draft_vocab_size),
    )
    content = plan.run_id if plan.data is None else plan.data.model_dump_json()  # not pinned: nobody else's counts
    return hashlib.sha256("\n".join((*parts, content)).encode()).hexdigest()[:16]
