"""``draftline export`` and ``draftline evaluate``: what to do with a trained draft after its run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from disagg_core.errors import BadInput
from disagg_core.report.suites import SUITE_HEAD, suite_figures, suite_rows
from disagg_core.run.known import find_run, read_plan
from disagg_core.run.plan import RunPlan
from disagg_core.run_spec.yaml_file import parse_spec, with_overrides
from disagg_core.settings import get_settings

_WIDTH_IN_A_PIPE = 180

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
    against: Annotated[
        str | None, typer.Option(help="Draft to compare with on the same prompts, as champion; named as --draft is.")
    ] = None,
    plain_server: Annotated[
        str | None, typer.Option(help="With --server: SGLang server of the same target without a draft.")
    ] = None,
    against_server: Annotated[
        str | None, typer.Option(help="With --server: SGLang server of the same target with the draft to compare with.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the result in the run's evaluation folder.")] = "again",
    suites: Annotated[
        list[str] | None,
        typer.Option("--suite", metavar="NAME=FILE", help="Measure this suite too, in place of the run's own."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Another value of the evaluation section, as draft_tokens=3."),
    ] = None,
) -> None:
    """Measure the accept length of a draft on the held-out prompts of a run, here or on an SGLang server.

    The suites of the run, or those given, are measured as well, by category. Decoding without a draft takes turns with
    it on the same prompts, and so does a draft that it is compared with.
    """
    from disagg_core.roles.evaluation import result_file, run_evaluation
    from disagg_core.roles.server_evaluation import Servers, run_server_evaluation

    plan = _with_evaluation(read_plan(find_run(get_settings().runs_dir, run)), suites or (), overrides or ())
    if server is not None:
        if draft is not None and draft not in _names(plan):
            raise BadInput(
                "--draft and --server: a server serves the draft that it was started with; give one of the two, or the "
                "name of the run's draft that it serves"
            )
        if against is not None:
            raise BadInput("--against and --server: the draft to compare with is served, too; give --against-server")
        result = run_server_evaluation(plan, Servers(server, plain_server, against_server), name, draft)
    else:
        if plain_server is not None or against_server is not None:
            raise BadInput("--plain-server and --against-server take effect beside --server only")
        other = draft_of(plan, against) if against is not None else None
        result = run_evaluation(plan, draft_of(plan, draft), name, other)
    Console().print(
        f"accept length {result['accept_length']:.3f} on {result['prompts']} prompts, "
        f"{result['target_passes']} target passes; written to {result_file(plan, name)}",
        soft_wrap=True,
    )
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_IN_A_PIPE)
    by_load = result.get("by_concurrency") or {None: result["suites"]}
    for load, found in by_load.items():
        console.print(_suites(found, title=f"{load} requests at once" if load is not None else None))


def _with_evaluation(plan: RunPlan, suites: Sequence[str], overrides: Sequence[str]) -> RunPlan:
    """Return `plan` with other `suites` (``name=file``) and other values of the evaluation section.

    Raises:
        SpecError: one has another form, or a value that is not allowed.
    """
    if not suites and not overrides:
        return plan
    document = plan.spec.model_dump(mode="json")
    pins = plan.data.suites if plan.data is not None else {}
    if suites:
        given = [suite.partition("=") for suite in suites]
        document["evaluation"]["suites"] = {name: str(Path(file).expanduser().resolve()) for name, _, file in given}
        pins = {}
    spec = parse_spec(with_overrides(document, [f"evaluation.{override}" for override in overrides]), source="evaluate")
    data = plan.data.model_copy(update={"suites": pins}) if plan.data is not None else None
    return plan.model_copy(update={"spec": spec, "data": data})


def _suites(results: dict[str, Any], *, title: str | None) -> Table:
    table = Table(*SUITE_HEAD, title=title)
    for row in suite_rows(suite_figures(results), parts=True):
        table.add_row(*row)
    return table


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
