"""The suites of a run: measured by several decoders in turn, here or on servers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from disagg_core.evaluation.questions import Question, read_suite
from disagg_core.evaluation.slices import SuiteResult, results_of
from disagg_core.evaluation.speculative import Decode
from disagg_core.evaluation.suites import run_suite
from disagg_core.prompts.encode import PromptEncoder
from disagg_core.run.plan import RunPlan
from disagg_core.target.tokenizer import load_tokenizer

Told = Callable[[str, int, int], None]
"""Told the name of a suite, the questions that were asked and all of them."""
SuiteResults = dict[str, dict[str, SuiteResult]]
"""Results by the decoder's name and the suite's."""


def measure_suites(
    plan: RunPlan,
    decoders: Mapping[str, Decode],
    references: Sequence[str],
    *,
    batch_size: int,
    by_category: bool = True,
    tell: Told = lambda name, done, total: None,
) -> SuiteResults:
    """Ask the questions of all suites of a run with each of `decoders`, in turn; see `run_suite`.

    The results are compared with those of the `references` among them.

    Raises:
        PromptError, DataChanged: as `read_suite`.
    """
    found: SuiteResults = {name: {} for name in decoders}
    suites = plan.spec.evaluation.suites
    if not suites:
        return found
    encoder = PromptEncoder(plan.spec, load_tokenizer(plan.spec.target), plan.target)
    room = plan.target.max_position_embeddings - plan.spec.evaluation.max_new_tokens
    for suite in suites:
        measured = run_suite(
            _questions(plan, suite),
            encoder,
            decoders,
            most_prompt_tokens=room,
            batch_size=batch_size,
            by_category=by_category,
            progress=partial(tell, suite),
        )
        for name, result in results_of(measured, references).items():
            found[name][suite] = result
    return found


def _questions(plan: RunPlan, name: str) -> list[Question]:
    """Return the questions of the suite called `name`, of each category as many as are asked for."""
    section, pins = plan.spec.evaluation, plan.data.suites if plan.data is not None else {}
    questions, _ = read_suite(Path(section.suites[name]).expanduser(), plan.spec.data, pins.get(name))
    if section.suite_prompts is None:
        return questions
    in_order = sorted(questions, key=lambda question: question.category)
    groups = itertools.groupby(in_order, key=lambda question: question.category)
    return [question for _, group in groups for question in itertools.islice(group, section.suite_prompts)]
