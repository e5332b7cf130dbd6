"""Counting the tokens that the draft vocabulary is chosen from: a step of the producer, before the first capture."""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from disagg_core.contracts import PromptTask
from disagg_core.drafts.export import import_draft
from disagg_core.drafts.vocab import VocabMap, count_tokens, derive_vocab_map
from disagg_core.drafts.warm_start import vocabulary_of
from disagg_core.engines.contract import Failed, Generated, Target
from disagg_core.errors import BadInput, TargetUnavailable
from disagg_core.processes.retry import Retry
from disagg_core.prompts.pool import PromptPool
from disagg_core.rollout.pipeline import largest_group
from disagg_core.run.plan import PlannedDraft, RunPlan
from disagg_core.run_spec.draft import keeps_vocabulary

log = logging.getLogger(__name__)

_MOST_COUNTED = 50_000
"""Prompts that are counted at most: more change no frequency that matters, and a run must not wait for them."""

_REPORT_EVERY = 64
_REPORT_S = 1.0
_AWAY_PAUSE_S = 0.5


def vocab_maps_of(
    plan: RunPlan, pool: PromptPool, target: Target, *, cache: Path, progress: Callable[[int, int | None], None]
) -> tuple[VocabMap, ...]:
    """Return the vocabulary map of each of the run's drafts: the one on disk, or a new one, which is saved.

    A continued draft keeps its own, unless the document gives it a size; one with the target's whole vocabulary has the
    identity. Otherwise tokens are counted, once for all drafts, where the loss mask is 1: over the prompts of the first
    epoch, or, when the target generates, over its continuations of as many prompts as the drafts' methods ask for. A
    map of another run in the folder `cache` is taken if it was derived from the same target, tokenizer, prompts and
    settings. `progress` is told prompts counted so far and in all.

    Raises:
        BadInput: a file on disk is damaged, or nothing was left to count.
        TargetUnavailable: no server could continue the prompts for ``target.unavailable_timeout_s``.
    """
    counting = _Counting(plan, pool, target, progress)
    return tuple(_vocab_map_of(draft, plan, counting, cache) for draft in plan.drafts)


def _vocab_map_of(draft: PlannedDraft, plan: RunPlan, counting: _Counting, cache: Path) -> VocabMap:
    if draft.dir.vocab_map.is_file():
        return VocabMap.load(draft.dir.vocab_map)
    if draft.init_path is not None and keeps_vocabulary(draft.section):
        kept = vocabulary_of(import_draft(draft.init_path))
        kept.save(draft.dir.vocab_map)
        log.info("vocabulary map %s: that of the draft to continue, %s", kept.version, draft.init_path)
        return kept
    size = draft.vocabulary.size
    inputs = _inputs_version(plan, size)
    vocab_map = derive_vocab_map(
        cache / f"{inputs}.safetensors",
        counting.counts,
        vocab_size=plan.target.vocab_size,
        draft_vocab_size=size,
        inputs_version=inputs,
        always=_stops(plan),
    )
    vocab_map.save(draft.dir.vocab_map)
    log.info("vocabulary map %s: %d of %d tokens", vocab_map.version, vocab_map.d2t.numel(), vocab_map.t2d.numel())
    return vocab_map


class _Counting:
    """The occurrences of each token, counted when they are first asked for."""

    def __init__(
        self, plan: RunPlan, pool: PromptPool, target: Target, progress: Callable[[int, int | None], None]
    ) -> None:
        self._plan, self._pool, self._target, self._progress = plan, pool, target, progress
        self._generating = plan.spec.data.generate is not None
        limit = _sampled_prompts(plan) if self._generating else _MOST_COUNTED
        self._total = limit if pool.end is None else min(limit, pool.end)
        self._so_far, self._reported = 0, time.monotonic()
        self._counts: Tensor | None = None

    def counts(self) -> Tensor:
        """Return the occurrences of each token, ``[V]``."""
        if self._counts is None:
            self._counts = count_tokens(self._samples(), self._plan.target.vocab_size, self._report)
        return self._counts

    def _samples(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._generating:
            rows = _continuations(self._plan, self._pool, self._target, self._tell)
        else:
            rows = _trained_tokens(self._pool)
        rows = itertools.islice(rows, self._total)
        first = next(rows, None)
        if first is None:
            raise BadInput("vocabulary map: expected at least one usable prompt to count tokens of, found none")
        for tokens in itertools.chain([first], rows):
            yield torch.tensor(tokens, dtype=torch.int64), torch.ones(len(tokens), dtype=torch.uint8)

    def _tell(self) -> None:
        self._progress(self._so_far, self._total)

    def _report(self, counted: int) -> None:
        self._so_far, now = counted, time.monotonic()
        if counted % _REPORT_EVERY == 0 or counted == self._total or now - self._reported >= _REPORT_S:
            self._reported = now
            self._progress(counted, self._total)


def _sampled_prompts(plan: RunPlan) -> int:
    """Return over how many prompts' continuations the drafts' vocabularies are counted."""
    return max(draft.vocabulary.sampled_prompts for draft in plan.drafts)


def _stops(plan: RunPlan) -> list[int]:
    """Return the tokens at which the target stops: a draft without them can never propose the end of a turn."""
    return [token for token in plan.target.eos_token_ids if 0 <= token < plan.target.vocab_size]


def _tasks(pool: PromptPool) -> Iterator[PromptTask]:
    ordinal = 0
    while (task := pool.task(ordinal)) is not None:
        if isinstance(task, PromptTask):
            yield task
        ordinal += 1


def _trained_tokens(pool: PromptPool) -> Iterator[list[int]]:
    for task in _tasks(pool):
        yield [token for token, live in zip(task.input_ids, task.loss_mask, strict=True) if live]


def _continuations(plan: RunPlan, pool: PromptPool, target: Target, tell: Callable[[], None]) -> Iterator[list[int]]:
    """Yield continuations by the target, in prompt order but for the order within a batch.

    The batches are the groups in which the same prompts will be leased, so that each is continued in the same company.
    `tell` is called when one is through: all of it counts from then on, while the next one takes its time.
    """
    group = largest_group(plan.watermarks, target.batch_size)
    together = group if target.batch_size > 1 else target.concurrency
    for _, batch in itertools.groupby(_tasks(pool), key=lambda task: task.ordinal // together):
        yield from _generated(plan, target, list(batch), tell)
        tell()


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


def _inputs_version(plan: RunPlan, draft_vocab_size: int) -> str:
    """Return a hash of what the counts depend on."""
    parts = (
        plan.target.version,
        plan.tokenizer_version,
        plan.spec.data.model_dump_json(),
        str(plan.spec.run.seed),
        str(_sampled_prompts(plan)),
        str(draft_vocab_size),
        str(_stops(plan)),
    )
    content = plan.run_id if plan.data is None else plan.data.model_dump_json()  # not pinned: nobody else's counts
    return hashlib.sha256("\n".join((*parts, content)).encode()).hexdigest()[:16]
