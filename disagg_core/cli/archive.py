"""``draftline archive``: is what a run left behind still what it was?"""

from __future__ import annotations

from typing import Annotated

import fsspec
import typer
from rich.console import Console

from disagg_core.errors import BadInput
from disagg_core.report.archive import verify_archive
from disagg_core.report.records import read_report
from disagg_core.run.known import find_run, known_runs
from disagg_core.settings import get_settings

app = typer.Typer(no_args_is_help=True)


@app.callback()
def archive() -> None:
    """Check the archive of a run."""


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


def archive_of(archived: str) -> str:
    """Return the URL of the archive meant by `archived`: a path or a URL, a run's id or the beginning of one.

    Raises:
        BadInput: it is a run without an archive, the beginning of several ids, or none of these.
    """
    runs = get_settings().runs_dir
    known = [run.run_id for run in known_runs(runs)]
    if archived not in known:
        filesystem, root = fsspec.core.url_to_fs(archived)
        if filesystem.exists(root):
            return archived
        if not any(run_id.startswith(archived) for run_id in known):
            there = ", ".join(known) or "none"
            raise BadInput(f"{archived}: no such run and no such archive; runs in {runs}: {there}")
    run = find_run(runs, archived)
    if run.report.is_file() and (made := read_report(run.report).archive) is not None:
        return made.url
    raise BadInput(f"run {run.run_id} has no archive: it has not completed; its directory is {run.root}")
