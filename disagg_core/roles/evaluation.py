"""The evaluation of a run as a process of its own: held-out prompts, target and drafts in, one JSON file per draft out.

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
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from disagg_core.drafts.export import import_draft
from disagg_core.drafts.method import DraftModel, FrozenParts
from disagg_core.errors import BadInput, DraftlineError, IncompatibleDraft, PromptError
from disagg_core.evaluation.accept_length import AcceptLength, decode_plainly, measure_accept_length
from disagg_core.evaluation.server import measure_on_server
from disagg_core.files import write_atomically
from disagg_core.prompts.pinned import PinnedFile
from disagg_core.roles.suites import measure_suites, measure_suites_on_server
from disagg_core.run.directory import NAME_PATTERN
from disagg_core.run.plan import RunPlan
from disagg_core.run.progress import ProgressFile
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
    threads: int | None = Field(None, ge=1, description="Threads on a CPU; by default torch's.")

    @model_validator(mode="after")
    def _outputs_have_a_checkpoint(self) -> EvaluationRequest:
        if unknown := set(self.outputs) - {name for name, _ in self.checkpoints}:
            raise ValueError(f"outputs: no checkpoint is called {sorted(unknown)}")
        return self


def run_evaluation(plan: RunPlan, checkpoint: Path, name: str) -> dict[str, Any]:
    """Measure the draft in `checkpoint` on the run's held-out prompts, as `evaluate_drafts` does for one draft.

    Raises:
        BadInput: `name` is not a plain name; otherwise as `evaluate_drafts`.
    """
    result_file(plan, name)
    return evaluate_drafts(EvaluationRequest(plan=plan, checkpoints=((name, checkpoint),), suites_of=(name,)))[0]


def run_server_evaluation(plan: RunPlan, url: str, name: str, draft: str | None = None) -> dict[str, Any]:
    """Measure the draft that the SGLang server at `url` serves, on the same prompts; the result file is `name`'s.

    `draft` names the one that is served, of a run with several.

    Raises:
        PromptError, BadInput, TargetUnavailable, EvaluationFailed: see `read_prompts` and `measure_on_server`.
    """
    section, target = plan.spec.evaluation, plan.spec.target
    output = result_file(plan, name)
    result = measure_on_server(
        url,
        read_prompts(plan.dir.evaluation / PROMPTS_FILE, section.prompts, _pinned(plan)),
        max_new_tokens=section.max_new_tokens,
        concurrency=target.server_concurrency,
        timeout_s=target.request_timeout_s,
        flags=plan.draft(draft).method.server_flags(section.draft_tokens),
    )
    return _write_result(output, result, {"server": url}, measure_suites_on_server(plan, url, draft))


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
    prompts = read_prompts(plan.dir.evaluation / PROMPTS_FILE, section.prompts, _pinned(plan))
    device = torch.device(_device(plan))
    if request.threads is not None and device.type == "cpu":
        torch.set_num_threads(request.threads)
    drafts = [(name, checkpoint, read_draft(checkpoint, plan)) for name, checkpoint in request.checkpoints]
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, plan.target.dtype)
    target = load_target(plan.spec.target, plan.target, dtype=dtype)
    progress = ProgressFile(plan.dir.evaluation / PROGRESS_FILE)

    def report(done: int, total: int, name: str) -> None:
        progress.update(draft=name, done=done, total=total)

    plain = decode_plainly(
        target,
        prompts,
        max_new_tokens=section.max_new_tokens,
        eos_token_ids=plan.target.eos_token_ids,
        progress=partial(report, name="none"),
    )
    results = []
    for name, checkpoint, draft in drafts:

        def told(suite: str, done: int, total: int, name: str = name) -> None:
            progress.update(draft=f"{name}, suite {suite}", done=done, total=total)

        result = measure_accept_length(
            target,
            attached(draft, target),
            prompts,
            draft_tokens=section.draft_tokens,
            max_new_tokens=section.max_new_tokens,
            eos_token_ids=plan.target.eos_token_ids,
            plain=plain,
            progress=partial(report, name=name),
        )
        logger.info("%s: accept length %.3f over %d passes", name, result.accept_length, result.target_passes)
        output = request.outputs.get(name, result_file(plan, name))
        suites = measure_suites(plan, target, draft, tell=told) if name in request.suites_of else {}
        results.append(_write_result(output, result, {"checkpoint": str(checkpoint)}, suites))
    progress.flush()
    return results


def _pinned(plan: RunPlan) -> PinnedFile | None:
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


def _write_result(path: Path, result: AcceptLength, origin: dict[str, str], suites: dict[str, Any]) -> dict[str, Any]:
    document = {**result.to_dict(), **origin, **({"suites": suites} if suites else {})}
    write_atomically(path, json.dumps(document, indent=2) + "\n")
    return document


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
