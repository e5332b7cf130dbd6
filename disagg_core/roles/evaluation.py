"""The evaluation of a run as a process of its own: held-out prompts, target and drafts in, one JSON file per draft out.

All drafts, and the target without one, take turns batch by batch on the same prompts, and are compared pair by pair.

``python -m disagg_core.roles.evaluation <request.json>`` reads an `EvaluationRequest`. The prompts are
``<run>/evaluation/prompts.jsonl``, lines of ``{"input_ids": [...]}``, written by the step that prepares the run.

On a CPU the target runs in fp32 whatever its own dtype, where "the target's argmax" is hardly ever a matter of
rounding; on a GPU it runs in its own.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from disagg_core.drafts.export import import_draft
from disagg_core.drafts.method import DraftModel, FrozenParts
from disagg_core.errors import BadInput, DraftlineError, IncompatibleDraft, PromptError
from disagg_core.evaluation.accept_length import AcceptLength, accept_length_of, check_measurable
from disagg_core.evaluation.slices import SuiteResult, measured_prompts, results_of
from disagg_core.evaluation.speculative import Decode, generate_all
from disagg_core.evaluation.turns import PLAIN, decode_in_turn
from disagg_core.files import write_atomically
from disagg_core.prompts.pinned import PinnedFile
from disagg_core.recurring.candidate import INCUMBENT
from disagg_core.roles.suites import SuiteResults, measure_suites
from disagg_core.run.directory import NAME_PATTERN
from disagg_core.run.plan import RunPlan
from disagg_core.run.progress import ProgressFile
from disagg_core.run_spec.results import HELD_OUT
from disagg_core.target.loading import load_target
from disagg_core.target.parts import parts_of
from disagg_core.target.text_model import logit_scale, shared_embedding_scale

logger = logging.getLogger(__name__)

PROMPTS_FILE = "prompts.jsonl"
PROGRESS_FILE = "progress.json"


Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class EvaluationRequest(BaseModel):
    """What the evaluation process is told."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: RunPlan = Field(description="The run.")
    checkpoints: tuple[tuple[Name, Path], ...] = Field(
        description="Name of the result, such as before, and directory of a checkpoint or exported draft."
    )
    outputs: dict[Name, Path] = Field(
        default_factory=dict, description="Files of the results by name; by default <run>/evaluation/<name>.json."
    )
    suites_of: tuple[Name, ...] = Field((), description="Results that have the suites of the run measured, too.")
    references: tuple[Name, ...] = Field(
        (), description="Results that the others are compared with, besides that of decoding without a draft."
    )
    threads: int | None = Field(None, ge=1, description="Threads on a CPU; by default torch's.")

    @model_validator(mode="after")
    def _names_are_of_checkpoints(self) -> EvaluationRequest:
        names = [name for name, _ in self.checkpoints]
        if len(set(names) - {PLAIN}) < len(names):
            raise ValueError(f"checkpoints: expected unlike names, none of them {PLAIN!r}, found {names}")
        for field in ("outputs", "suites_of", "references"):
            if unknown := set(getattr(self, field)) - set(names):
                raise ValueError(f"{field}: no checkpoint is called {sorted(unknown)}")
        return self


def run_evaluation(plan: RunPlan, checkpoint: Path, name: str, against: Path | None = None) -> dict[str, Any]:
    """Measure the draft in `checkpoint` on the run's held-out prompts and suites, as `evaluate_drafts` does.

    It is compared with the draft in `against`, too, whose result has the same name and ``-against``.

    Raises:
        BadInput: `name` is not a plain name, or one that the other decoders have; otherwise as `evaluate_drafts`.
    """
    result_file(plan, name)
    if name in (PLAIN, INCUMBENT):
        raise BadInput(f"expected another name for the result than {PLAIN!r} and {INCUMBENT!r}, found {name!r}")
    drafts = ((name, checkpoint), *(((INCUMBENT, against),) if against is not None else ()))
    names = tuple(draft for draft, _ in drafts)
    request = EvaluationRequest(
        plan=plan,
        checkpoints=drafts,
        outputs={INCUMBENT: result_file(plan, f"{name}-against")} if against is not None else {},
        suites_of=names,
        references=names[1:],
    )
    return evaluate_drafts(request)[0]


def result_file(plan: RunPlan, name: str) -> Path:
    """Return the file of the result called `name`.

    Raises:
        BadInput: it is not a plain name, so its file could lie elsewhere.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise BadInput(f"expected a name of letters, digits, '.', '_' and '-' for the result, found {name!r}")
    return plan.dir.evaluation / f"{name}.json"


def evaluate_drafts(request: EvaluationRequest) -> list[dict[str, Any]]:
    """Measure every draft of `request`, write one file each (atomically) and return their contents, in order.

    Raises:
        PromptError: the prompts or a suite are missing or cannot be read.
        TargetError: the target cannot be loaded.
        IncompatibleDraft: a draft does not fit its config or the run's target.
        BadInput: a draft cannot propose as many tokens as ``evaluation.draft_tokens`` says.
        EvaluationFailed: nothing could be measured.
    """
    plan, section = request.plan, request.plan.spec.evaluation
    prompts = read_prompts(plan.dir.evaluation / PROMPTS_FILE, section.prompts, pinned_prompts(plan))
    check_measurable(prompts, section.max_new_tokens)
    device = torch.device(_device(plan))
    if request.threads is not None and device.type == "cpu":
        torch.set_num_threads(request.threads)
    drafts = {name: read_draft(checkpoint, plan) for name, checkpoint in request.checkpoints}
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, plan.target.dtype)
    target = load_target(plan.spec.target, plan.target, dtype=dtype)
    for draft in drafts.values():
        attached(draft, target)
    progress = ProgressFile(plan.dir.evaluation / PROGRESS_FILE)
    decoders = _decoders(plan, target, drafts)
    decoded = decode_in_turn(
        prompts,
        decoders,
        batch_size=section.batch_size,
        progress=lambda done, total: progress.update(drafts=", ".join(decoders), done=done, total=total),
    )
    measured = {name: measured_prompts(prompts, found) for name, found in decoded.items()}
    held_out = results_of(measured, (PLAIN, *request.references))
    suites = _suites(request, target, drafts, progress) if request.suites_of else {}
    results = []
    for name, checkpoint in request.checkpoints:
        result = accept_length_of(target, prompts, decoded[name], decoded[PLAIN], draft_tokens=section.draft_tokens)
        logger.info("%s: accept length %.3f over %d passes", name, result.accept_length, result.target_passes)
        output = request.outputs.get(name, result_file(plan, name))
        found = {HELD_OUT: held_out[name], **suites.get(name, {})}
        results.append(write_result(output, result, {"checkpoint": str(checkpoint)}, found))
    progress.flush()
    return results


def _suites(
    request: EvaluationRequest, target: nn.Module, drafts: Mapping[str, DraftModel], progress: ProgressFile
) -> SuiteResults:
    """Return what the request's drafts, and decoding without one, do with the suites of the run."""
    section = request.plan.spec.evaluation
    asked = {name: drafts[name] for name in request.suites_of}
    return measure_suites(
        request.plan,
        _decoders(request.plan, target, asked, temperature=section.suite_temperature),
        (PLAIN, *request.references),
        batch_size=section.batch_size,
        tell=lambda suite, done, total: progress.update(drafts=f"suite {suite}", done=done, total=total),
    )


def _decoders(
    plan: RunPlan, target: nn.Module, drafts: Mapping[str, DraftModel], *, temperature: float = 0.0
) -> dict[str, Decode]:
    """Return what decodes with each of `drafts`, which are attached to `target`, and without one."""
    section = plan.spec.evaluation
    device = next(target.parameters()).device
    return {
        name: partial(
            generate_all,
            target,
            draft,
            draft_tokens=section.draft_tokens,
            max_new_tokens=section.max_new_tokens,
            temperature=temperature,
            generator=torch.Generator(device=device).manual_seed(plan.spec.run.seed),
            eos_token_ids=plan.target.eos_token_ids,
            batch_size=section.batch_size,
        )
        for name, draft in (*drafts.items(), (PLAIN, None))
    }


def pinned_prompts(plan: RunPlan) -> PinnedFile | None:
    """Return the pin of the run's held-out prompts, if they are pinned."""
    return plan.data.evaluation if plan.data is not None else None


def read_prompts(path: Path, limit: int, pinned: PinnedFile | None = None) -> list[list[int]]:
    """Return the token ids of the first `limit` prompts in `path`.

    Raises:
        DataChanged: the file is not what was `pinned`.
        PromptError: no such file, no prompts in it, or a line that is not ``{"input_ids": [...]}`` with tokens.
    """
    if not path.is_file():
        raise PromptError(f"{path}: no such file; the preflight step of a run writes the held-out prompts there")
    content = path.read_bytes()
    if pinned is not None:
        pinned.check(PinnedFile.of(content), path)
    prompts: list[list[int]] = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            prompts.append(_Prompt.model_validate_json(line).input_ids)
        except ValueError as error:
            raise PromptError(f'{path}, line {number}: expected {{"input_ids": [<ids>]}}: {error}') from error
    if not prompts[:limit]:
        raise PromptError(f"{path}: expected at least one prompt, found {len(prompts)} and a limit of {limit}")
    return prompts[:limit]


def read_draft(path: Path, plan: RunPlan) -> DraftModel:
    """Return the draft in `path`, in fp32 on the CPU, without the target's parts.

    A draft of one of the run's methods reads the layers that the run captures for it, also where its files name none.

    Raises:
        IncompatibleDraft: no draft is there, or it was made for other sizes or layers than the run's target has.
    """
    method, config, state = import_draft(path)
    facts = plan.target
    pairs: dict[str, tuple[object, object]] = {
        "target_hidden_size": (facts.hidden_size, config.target_hidden_size),
        "vocab_size": (facts.vocab_size, config.vocab_size),
    }
    known = [draft.capture.layers for draft in plan.drafts if draft.section.method == method.name]
    if known:
        config = config if config.layers else config.with_layers(known[0])
        pairs["layers"] = (config.layers if config.layers in known else known[0], config.layers)
    faults = [f"{field}: expected {want}, found {found}" for field, (want, found) in pairs.items() if want != found]
    if faults:
        raise IncompatibleDraft(f"{path}: made for another target than {facts.model}: " + "; ".join(faults))
    draft = method.model(config)
    draft.load_serving_state_dict(state)
    return draft.eval().requires_grad_(False)


def attached(draft: DraftModel, target: nn.Module) -> DraftModel:
    """Give `draft` the frozen parts of the loaded `target`, and move it to the target's device and dtype."""
    embedding, lm_head = parts_of(target)
    model: Any = target
    draft.attach(
        FrozenParts(
            embedding,
            lm_head,
            logit_scale=logit_scale(model.config),
            embedding_scale=shared_embedding_scale(model.config.get_text_config()),
        )
    )
    return draft.to(device=embedding.device, dtype=embedding.dtype)


def main(arguments: Sequence[str]) -> int:
    """Run the evaluation that the request file in `arguments` describes; return the process's exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if len(arguments) != 1:
        logger.error("usage: python -m disagg_core.roles.evaluation <request.json>")
        return 2
    try:
        evaluate_drafts(read_request(Path(arguments[0])))
    except DraftlineError as error:
        logger.error("%s: %s", type(error).__name__, error)
        return 1
    return 0


def read_request(path: Path) -> EvaluationRequest:
    """Return the request in `path`.

    Raises:
        BadInput: the file cannot be read or is not an `EvaluationRequest`.
    """
    try:
        return EvaluationRequest.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: expected an evaluation request: {error}") from error


class _Prompt(BaseModel):
    input_ids: list[int] = Field(min_length=1)


def _device(plan: RunPlan) -> str:
    chosen = plan.spec.target.device
    return ("cuda" if torch.cuda.is_available() else "cpu") if chosen == "auto" else chosen


def write_result(
    path: Path, result: AcceptLength, origin: Mapping[str, Any], suites: Mapping[str, SuiteResult]
) -> dict[str, Any]:
    """Write a result and what is known of it by suite as JSON, and return the document as it is read."""
    by_suite = {name: asdict(suite) for name, suite in suites.items()}
    text = json.dumps({**result.to_dict(), **origin, "suites": by_suite}, indent=2)
    write_atomically(path, text + "\n")
    document: dict[str, Any] = json.loads(text)
    return document


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
