"""``draftline archive``: is what a run left behind still what it was, get it back, and what may go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from disagg_core.cli.tables import table_of, wide_console
from disagg_core.errors import BadInput
from disagg_core.report.archive import fetch_archive, verify_archive
from disagg_core.report.differences import Difference
from disagg_core.report.records import read_report
from disagg_core.report.run_comparison import compare_runs
from disagg_core.run.known import find_run, known_runs, read_plan
from disagg_core.run_spec.results import RetentionSection
from disagg_core.settings import get_settings
from disagg_core.storage.place import LocalPlace, Place, open_place

app = typer.Typer(no_args_is_help=True)

_KEPT = RetentionSection()


@app.callback()
def archive() -> None:
    """Check, fetch, make up for and tidy up the archives of runs."""


@app.command()
def verify(
    archived: Annotated[
        str,
        typer.Argument(
            metavar="RUN|PATH|URL",
            help="Id of a run or the beginning of it, or where an archive is.",
            show_default=False,
        ),
    ],
) -> None:
    """Compare every file of an archive with its manifest, by size and SHA-256.

    Exit status: 0 if all are what they were, 2 if files are damaged or missing (each is named) or there is no archive.
    """
    url = archive_of(archived)
    Console(highlight=False).print(f"{url}: {verify_archive(url)} files are what the manifest says", soft_wrap=True)


@app.command()
def fetch(
    archived: Annotated[str, typer.Argument(metavar="RUN|PATH|URL", help="As for verify.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", help="Directory to make.")],
    only: Annotated[str, typer.Option("--only", help="Files whose names begin so, such as checkpoints/.")] = "",
) -> None:
    """Copy an archive here, every file checked against its manifest."""
    typer.echo(fetch_archive(archive_of(archived), to.absolute(), only))


@app.command()
def create(
    run: Annotated[str, typer.Argument(help="Id of a run or the beginning of it.", show_default=False)],
    ended: Annotated[
        bool, typer.Option("--ended", help="The run has ended, although its files were written just now.")
    ] = False,
) -> None:
    """Archive a run that could not do so itself: it was killed with its worker, or the archive was away.

    One that left no report is reported as crashed.
    """
    from disagg_core.registry.run_archive import archive_ended

    settings = get_settings()
    report = archive_ended(read_plan(find_run(settings.runs_dir, run)), settings, sure=ended)
    assert report.archive is not None
    Console(highlight=False).print(f"{report.run_id} ({report.state}): {report.archive.url}", soft_wrap=True)


@app.command()
def prune(
    url: Annotated[
        str | None, typer.Option("--url", help="Where the archives are; default: archive/ under DRAFTLINE_HOME.")
    ] = None,
    last: Annotated[int, typer.Option(min=1, help="Archives of a run name that stay, however old.")] = _KEPT.last,
    days: Annotated[float, typer.Option(min=0, help="Archives younger than this stay.")] = _KEPT.days,
    registry: Annotated[
        list[str] | None, typer.Option("--registry", help="Further registries, whose drafts' archives stay too.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which would go.")] = False,
) -> None:
    """Remove old archives. One of a run whose draft is in a registry stays, and so does one that is not finished."""
    from disagg_core.registry.retained import prune as pruned

    settings = get_settings()
    also = [*(registry or []), settings.registry or str(settings.home / "registry")]
    gone = pruned(url or str(settings.home / "archive"), last=last, days=days, also=also, remove=not dry_run)
    console = Console(highlight=False)
    for archive in gone:
        freed = f"{archive.bytes / 2**20:,.1f} MiB"
        console.print(f"{'would go' if dry_run else 'removed'}: {archive.place.url}, {freed}", soft_wrap=True)
    if not gone:
        console.print("nothing is old enough to go")


def diff(
    one: Annotated[
        str, typer.Argument(metavar="A", help="Id of a run or the beginning of it, or where an archive is.")
    ],
    other: Annotated[str, typer.Argument(metavar="B", help="As A.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Show in what two runs differed (document, data, identity, versions), and what came of it."""
    found = compare_runs(files_of_run(one), files_of_run(other))
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    console = wide_console()
    for kind in ("document", "data", "identity", "versions", "results"):
        differences: list[Difference] = getattr(found, kind)
        if differences:
            console.print(table_of(differences, kind, [one, other]))
        else:
            console.print(f"{kind}: no difference")
    if found.curves:
        table = Table("figure", "step", one, other, title="curves", title_justify="left")
        for point in found.curves:
            values = ("" if value is None else f"{value:.4f}" for value in (point.one, point.other))
            table.add_row(point.figure, str(point.step), *values)
        console.print(table)


def files_of_run(name: str) -> Place:
    """Return where the files of a run are: its directory on this machine, or its archive.

    Raises:
        BadInput: `name` is neither an archive nor a run's id or the beginning of one.
    """
    runs = get_settings().runs_dir
    if not any(run.run_id.startswith(name) for run in known_runs(runs)):
        return open_place(archive_of(name))
    return LocalPlace(find_run(runs, name).root)


def archive_of(archived: str) -> str:
    """Return the URL of the archive meant by `archived`: a path or a URL, a run's id or the beginning of one.

    Raises:
        BadInput: it is a run without an archive, the beginning of several ids, or none of these.
    """
    runs = get_settings().runs_dir
    known = [run.run_id for run in known_runs(runs)]
    if archived not in known:
        if open_place(archived).children():
            return archived
        if not any(run_id.startswith(archived) for run_id in known):
            there = ", ".join(known) or "none"
            raise BadInput(f"{archived}: no such run and no such archive; runs in {runs}: {there}")
    run = find_run(runs, archived)
    if run.report.is_file() and (made := read_report(run.report).archive) is not None:
        return made.url
    raise BadInput(
        f"run {run.run_id} has no archive: expected it to have ended; if it was killed, `draftline archive create "
        f"{run.run_id}` makes one; its directory is {run.root}"
    )
