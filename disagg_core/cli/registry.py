"""``draftline drafts``: the versions of a target's draft in the registry, and which of them is served."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from disagg_core.cli.exits import warn
from disagg_core.cli.tables import table_of, wide_console
from disagg_core.errors import BadInput, DraftlineError
from disagg_core.registry.registry import EXPORT, Registry, the_target_of, whoami
from disagg_core.registry.versions import Event, Version
from disagg_core.report.differences import compare
from disagg_core.report.records import read_report
from disagg_core.run.known import find_run, read_plan
from disagg_core.settings import get_settings
from disagg_core.storage.place import open_place

if TYPE_CHECKING:
    from disagg_core.registry.references import References

app = typer.Typer(no_args_is_help=True)

Url = Annotated[
    str | None,
    typer.Option(
        "--registry",
        help="Directory or URL; default: DRAFTLINE_REGISTRY, or registry/ under DRAFTLINE_HOME.",
        show_default=False,
    ),
]
Target = Annotated[
    str | None,
    typer.Option("--target", help="Name of the target there; needed where it has several.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Name = Annotated[str, typer.Argument(metavar="DRAFT", help="champion, latest, a version such as v3, or a run's id.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the history.", show_default=False)]


@app.callback()
def drafts() -> None:
    """The versions of a target's draft, and which of them is the champion."""


@app.command("list")
def list_versions(registry: Url = None, target: Target = None, as_json: Json = False) -> None:
    """Show all versions, and which is the champion."""
    opened = _open(registry, target)
    versions, champion = opened.versions(), opened.champion()
    unfinished = opened.unfinished()
    if as_json:
        _print_json(
            {
                "registry": opened.place.url,
                "champion": champion.number if champion else None,
                "versions": [_brief(version) for version in versions],
                "unfinished": {f"v{number}": run_id for number, run_id in unfinished.items()},
            }
        )
        return
    table = Table(
        "", "version", "run", "draft", "accept length", "continued from", "made", "size", title=opened.place.url
    )
    for version in versions:
        known = version.provenance
        table.add_row(
            "champion" if champion is not None and champion.number == version.number else "",
            version.label,
            known.run_id,
            f"{known.method}, {known.draft}",
            "" if known.accept_length is None else f"{known.accept_length:.3f}",
            known.parent or "",
            _when(known.created),
            f"{version.bytes / 2**20:,.1f} MiB",
        )
    wide_console().print(table)
    for number, run_id in unfinished.items():
        wide_console().print(f"v{number} of run {run_id} was not finished; its run finishes it when it is retried")


@app.command()
def show(name: Name, registry: Url = None, target: Target = None, as_json: Json = False) -> None:
    """Show where a version comes from, what it holds, and when it was the champion."""
    opened = _open(registry, target)
    version = _references(opened).version(name)
    moves = [event for event in opened.history() if version.number in (event.version, event.previous)]
    if as_json:
        _print_json({**version.model_dump(mode="json"), "history": [event.model_dump(mode="json") for event in moves]})
        return
    table = Table("", "", show_header=False, title=f"{version.label} of {opened.place.url}", title_justify="left")
    for key, value in _brief(version).items():
        table.add_row(key, value if isinstance(value, str) else json.dumps(value))
    for event in moves:
        table.add_row(_when(event.at), _said(event))
    wide_console().print(table)


@app.command()
def diff(
    one: Annotated[str, typer.Argument(metavar="A", help="As for show.")],
    other: Annotated[str, typer.Argument(metavar="B", help="As for show.")],
    registry: Url = None,
    target: Target = None,
    as_json: Json = False,
) -> None:
    """Show in what two versions differ: identity, document, data, and what came of it."""
    references = _references(_open(registry, target))
    found = [references.version(name) for name in (one, other)]
    differences = compare(*(_comparable(version) for version in found))
    if as_json:
        _print_json([difference.model_dump(mode="json") for difference in differences])
    elif differences:
        wide_console().print(table_of(differences, "", [version.label for version in found]))
    else:
        wide_console().print(f"{found[0].label} and {found[1].label} do not differ")


@app.command()
def publish(
    run: Annotated[str, typer.Argument(help="Id of a run on this machine, or the beginning of it.")],
    name: Annotated[
        str | None, typer.Option("--draft", help="Name of one of the run's drafts; by default its only one.")
    ] = None,
) -> None:
    """Keep the newest checkpoint of a run as a version of its registry, in every format; promotes nothing."""
    from disagg_core.cli.drafts import newest_checkpoint
    from disagg_core.registry.publishing import publish_draft
    from disagg_core.registry.references import open_registry

    settings = get_settings()
    found = find_run(settings.runs_dir, run)
    plan = read_plan(found)
    draft = plan.draft(name)
    report = read_report(found.report) if found.report.is_file() else None
    measured = report.evaluations.get(draft.name) if report is not None else None
    version = publish_draft(
        open_registry(plan.spec, settings),
        plan,
        draft,
        draft.checkpoint_in(newest_checkpoint(plan)),
        accept_length=measured.accept_length_after if measured is not None else None,
        archive=report.archive.url if report and report.archive else None,
    )
    wide_console().print(f"{version.label} of {version.provenance.target}: run {plan.run_id}, {version.files} files")


@app.command()
def promote(
    name: Name,
    registry: Url = None,
    target: Target = None,
    instead_of: Annotated[
        str | None,
        typer.Option(
            help="The champion to replace, none for none; refused if it is another. Default: the present one."
        ),
    ] = None,
    reason: Reason = "",
) -> None:
    """Make a version the champion. Exit status: 0 done, 1 somebody else has moved the champion, 2 no such version."""
    opened = _open(registry, target)
    references = _references(opened)
    number = references.version(name).number
    if instead_of is None:
        present = opened.champion()
    else:
        present = None if instead_of == "none" else references.version(instead_of)
    if present is not None and present.number == number and instead_of is None:
        raise BadInput(f"{opened.place.url}: v{number} is the champion already")
    event = opened.promote(number, instead_of=present.number if present else None, by=whoami(), reason=reason)
    _tell_of_move(opened, event)


@app.command()
def rollback(
    registry: Url = None,
    target: Target = None,
    to: Annotated[str | None, typer.Option(help="Version to go back to; default: the champion before.")] = None,
    reason: Reason = "",
) -> None:
    """Make the champion before the present one the champion again."""
    opened = _open(registry, target)
    number = None if to is None else _references(opened).version(to).number
    _tell_of_move(opened, opened.rollback(by=whoami(), to=number, reason=reason))


@app.command()
def mirror(registry: Url = None, target: Target = None) -> None:
    """Make the champion that of MLflow's registry, where the document of its run names a registered model.

    Every move of the champion does so by itself; this is for a server that was away then.
    """
    opened = _open(registry, target)
    champion = opened.champion()
    if champion is None:
        raise BadInput(f"{opened.place.url}: expected a champion, found none")
    model = _mirrored(opened, champion)
    told = (
        f"{champion.label} is the champion of {model}" if model else f"the run of {champion.label} asks for no mirror"
    )
    wide_console().print(told)


@app.command()
def history(registry: Url = None, target: Target = None, as_json: Json = False) -> None:
    """Show every move of the champion."""
    events = _open(registry, target).history()
    if as_json:
        _print_json([event.model_dump(mode="json") for event in events])
        return
    table = Table("when", "what", "why")
    for event in events:
        table.add_row(_when(event.at), event.describe(), event.reason)
    wide_console().print(table)


@app.command()
def fetch(
    name: Name,
    to: Annotated[Path, typer.Option("--to", help="Directory below which the draft is put, in a folder of its own.")],
    registry: Url = None,
    target: Target = None,
    layout: Annotated[
        str | None, typer.Option("--format", help="Serving format; default: the method's first.", show_default=False)
    ] = None,
) -> None:
    """Copy a version's export here, checked, and print its directory, for the start script of a server.

    Nothing else is printed to standard output. A version has a folder of its own, which never changes: a server that
    runs keeps what it has loaded.
    """
    opened = _open(registry, target)
    version = _references(opened).version(name)
    formats = version.provenance.formats
    chosen = layout or next(iter(formats), None)
    if chosen is None or chosen not in formats:
        raise BadInput(f"--format: expected one of {', '.join(formats) or 'none'} of {version.label}, found {layout}")
    to.mkdir(parents=True, exist_ok=True)
    path = opened.fetch(version.number, f"{EXPORT}/{chosen}", to.absolute() / f"{opened.name}-{version.label}-{chosen}")
    typer.echo(path)


def _open(url: str | None, target: str | None) -> Registry:
    settings = get_settings()
    place = open_place(url or settings.registry or str(settings.home / "registry"))
    return Registry(place, the_target_of(place, target))


def _references(registry: Registry) -> References:
    from disagg_core.registry.references import References  # 2 s of torch, which a list needs none of

    settings = get_settings()
    return References(registry, runs=settings.runs_dir, cache=settings.drafts_cache)


def _comparable(version: Version) -> dict[str, Any]:
    """Return what two versions are compared by: not when, where and as which run they were made."""
    known = version.provenance.model_dump(mode="json", exclude={"run_id", "created", "archive"})
    document = known.pop("document")
    document.get("run", {}).pop("name", None)
    return {**known, "document": document, "content": version.content}


def _brief(version: Version) -> dict[str, Any]:
    known = version.provenance.model_dump(mode="json", exclude={"document"}, exclude_none=True)
    return {
        "version": version.number,
        **known,
        "content": version.content,
        "bytes": version.bytes,
        "files": version.files,
    }


def _tell_of_move(registry: Registry, event: Event) -> None:
    """Say that the champion was moved, and tell MLflow: a server that is away is no reason to take the move back."""
    wide_console().print(_said(event))
    try:
        _mirrored(registry, registry.version(event.version))
    except DraftlineError as error:
        warn(error)


def _mirrored(registry: Registry, champion: Version) -> str | None:
    from disagg_core.tracking.mlflow_models import mirror_champion

    return mirror_champion(champion, registry.url_of(champion.number))


def _said(event: Event) -> str:
    return event.describe() + (f": {event.reason}" if event.reason else "")


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _print_json(value: object) -> None:
    typer.echo(json.dumps(value, indent=2))
