"""The suites of a run: checked before it, and measured with a draft here or on a server that serves one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from disagg_core.drafts.method import DraftModel
from disagg_core.evaluation.server import decoding_on_server
from disagg_core.evaluation.speculative import Generation, generate_all
from disagg_core.evaluation.suites import Decode, Question, read_suite, run_suite
from disagg_core.prompts.encode import PromptEncoder
from disagg_core.run.plan import RunPlan
from disagg_core.target.tokenizer import load_tokenizer

Told = Callable[[str, int, int], None]
"""Told the name of a suite, the questions that were asked and all of them."""


def measure_suites(
    plan: RunPlan, target: nn.Module, draft: DraftModel, *, tell: Told = lambda name, done, total: None
) -> dict[str, Any]:
    """Ask the questions of all suites with `draft`, which is attached to `target`; return the figures by suite.

    Raises:
        PromptError, DataChanged: as `read_suite`.
    """
    section = plan.spec.evaluation
    generator = torch.Generator(device=next(target.parameters()).device).manual_seed(plan.spec.run.seed)

    def decode(prompts: Sequence[Sequence[int]]) -> list[Generation]:
        return generate_all(
            target,
            draft,
            prompts,
            draft_tokens=section.draft_tokens,
            max_new_tokens=section.max_new_tokens,
            temperature=section.suite_temperature,
            generator=generator,
            eos_token_ids=plan.target.eos_token_ids,
        )

    return _measured(plan, decode, tell)


def measure_suites_on_server(plan: RunPlan, url: str, draft: str | None = None) -> dict[str, Any]:
    """Let the SGLang server at `url` answer the questions of all suites; return the figures by suite.

    `draft` names the one that is served, of a run with several.

    Raises:
        PromptError, DataChanged: as `read_suite`.
        BadInput, TargetUnavailable, EvaluationFailed: as `measure_on_server`.
    """
    section, target = plan.spec.evaluation, plan.spec.target
    with decoding_on_server(
        url,
        max_new_tokens=section.max_new_tokens,
        temperature=section.suite_temperature,
        concurrency=target.server_concurrency,
        timeout_s=target.request_timeout_s,
        flags=plan.draft(draft).method.server_flags(section.draft_tokens),
    ) as decode:
        return _measured(plan, decode, lambda name, done, total: None)


def _measured(plan: RunPlan, decode: Decode, tell: Told) -> dict[str, Any]:
    suites = plan.spec.evaluation.suites
    if not suites:
        return {}
    encoder = PromptEncoder(plan.spec, load_tokenizer(plan.spec.target), plan.target)
    room = plan.target.max_position_embeddings - plan.spec.evaluation.max_new_tokens
    found: dict[str, Any] = {}
    for name in suites:

        def progress(done: int, total: int, name: str = name) -> None:
            tell(name, done, total)

        questions = _questions(plan, name)
        found[name] = asdict(run_suite(questions, encoder, decode, most_prompt_tokens=room, progress=progress))
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
