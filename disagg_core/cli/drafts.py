"""``draftline export`` and ``draftline evaluate``: what to do with a trained draft after its run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from disagg_core.errors import BadInput
from disagg_core.run.known import find_run, read_plan
from disagg_core.run.plan import RunPlan
from disagg_core.settings import get_settings

Run = Annotated[str, typer.Argument(help="Id of a run, or the beginning of it.", show_default=False)]
Draft = Annotated[
    str | None,
    typer.Option(
        "--draft",
        help="Draft: the name of one of the run's drafts for its newest checkpoint; champion, latest or a version of "
        "the registry, a run's id, a directory, a Hugging Face id or a URL; by default the run's only draft.",
    ),
]


def export(
    run: Run,
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")],
    layout: Annotated[
        str | None,
        typer.Option("--format", help="Serving format, one of the draft method's; by default its first."),
    ] = None,
    draft: Draft = None,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="Data type of the weights.")] = (
        "bfloat16"
    ),
) -> None:
    """Write a run's draft in a serving format, checked and read back."""
    from disagg_core.drafts.export import VerifierInfo, export_draft, method_at

    plan = read_plan(find_run(get_settings().runs_dir, run))
    source = draft_of(plan, draft)
    method = method_at(source)
    if layout is None:
        layout = next(iter(method.formats))
    if layout not in method.formats:
        offered = "; ".join(f"{name} ({known.loaded_by})" for name, known in method.formats.items())
        raise BadInput(f"--format: expected one of {offered}, found {layout!r}")
    verifier = VerifierInfo.of(plan.spec.target) if method.formats[layout].names_target else None
    draft_tokens = plan.spec.evaluation.draft_tokens
    try:
        written = export_draft(source, out, layout, dtype=dtype, verifier=verifier, draft_tokens=draft_tokens)
    except OSError as error:
        raise BadInput(f"the export of {source} to {out}: {error.filename}: {error.strerror}") from error
    Console().print(
        f"{written.path}: {written.tensors} tensors, {written.bytes} bytes, {written.dtype}", soft_wrap=True
    )


def evaluate(
    run: Run,
    draft: Draft = None,
    server: Annotated[
        str | None, typer.Option(help="SGLang server that serves target and draft; measured by its own counters.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the result in the run's evaluation folder.")] = "again",
) -> None:
    """Measure the accept length of a draft on the held-out prompts of a run, here or on an SGLang server."""
    from disagg_core.roles.evaluation import result_file, run_evaluation, run_server_evaluation

    plan = read_plan(find_run(get_settings().runs_dir, run))
    if server is not None:
        if draft is not None and draft not in _names(plan):
            raise BadInput(
                "--draft and --server: a server serves the draft that it was started with; give one of the two, or the "
                "name of the run's draft that it serves"
            )
        result = run_server_evaluation(plan, server, name, draft)
    else:
        result = run_evaluation(plan, draft_of(plan, draft), name)
    Console().print(
        f"accept length {result['accept_length']:.3f} on {result['prompts']} prompts, "
        f"{result['target_passes']} target passes; written to {result_file(plan, name)}",
        soft_wrap=True,
    )


def _names(plan: RunPlan) -> list[str]:
    return [draft.name for draft in plan.drafts]


def draft_of(plan: RunPlan, reference: str | None) -> Path:
    """Return the directory of the draft that `reference` means for a run; that of its only draft if it is None.

    Raises:
        BadInput: there is none, or it is not said which of several drafts.
    """
    from disagg_core.registry.references import References

    if reference is not None and reference not in _names(plan):
        return References.of(plan.spec, get_settings()).find(reference).path
    return plan.draft(reference).checkpoint_in(newest_checkpoint(plan))


def newest_checkpoint(plan: RunPlan) -> Path:
    """Return the newest whole checkpoint of a run.

    Raises:
        BadInput: it has none.
    """
    from disagg_core.training.checkpoint import newest_complete

    newest = newest_complete(plan.dir.checkpoints)
    if newest is None:
        raise BadInput(f"run {plan.run_id} has no whole checkpoint in {plan.dir.checkpoints}")
    return newest
