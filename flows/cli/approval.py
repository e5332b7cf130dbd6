"""``draftline drafts approve | reject``: the answer to a run that waits for one, as its form in the UI gives it."""

from __future__ import annotations

import os
from typing import Annotated
from uuid import UUID

import typer
from rich.console import Console

from disagg_core.errors import BadInput
from disagg_core.report.records import read_report
from disagg_core.run.known import find_run
from disagg_core.settings import get_settings

Run = Annotated[str, typer.Argument(help="Id of the run that waits, or the beginning of it.", show_default=False)]
Comment = Annotated[str, typer.Option("--comment", help="Why; kept in the report and in the registry's history.")]


def approve(run: Run, comment: Comment = "") -> None:
    """Approve the draft of a run that waits for it: it becomes the champion."""
    _answer(run, "approve", comment)


def reject(run: Run, comment: Comment = "") -> None:
    """Reject the draft of a run that waits for approval: the champion stays."""
    _answer(run, "reject", comment)


def _answer(run: str, decision: str, comment: str) -> None:
    if "PREFECT_API_URL" not in os.environ:
        raise BadInput(
            "PREFECT_API_URL is not set: expected the URL of the Prefect server's API on which the run waits"
        )
    from prefect.flow_runs import resume_flow_run

    from flows.platform.submission import state_of

    found = find_run(get_settings().runs_dir, run)
    flow_run_id = read_report(found.report).flow_run_id if found.report.is_file() else None
    state = state_of(flow_run_id) if flow_run_id is not None else None
    if flow_run_id is None or state != "Suspended":
        raise BadInput(
            f"run {found.run_id}: expected a run that waits for approval, found one that is {state or 'not'}"
        )
    resume_flow_run(UUID(flow_run_id), run_input={"decision": decision, "comment": comment})
    Console().print(f"run {found.run_id}: {decision}; it goes on")
