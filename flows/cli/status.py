"""``draftline status``: the platform's processes and the latest runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from disagg_core.report.figures import BRIEF, brief_figures
from disagg_core.report.records import read_report
from disagg_core.run.bottleneck import bottleneck_line
from disagg_core.run.directory import RunDir
from disagg_core.run.known import OtherVersion, known_runs, read_plan
from disagg_core.run.progress import read_progress
from disagg_core.settings import Settings
from flows.cli.run_view import rollout_line
from flows.platform.local import LocalPlatform, describe

_LATEST = 10


def show(settings: Settings, platform: LocalPlatform | None, console: Console) -> None:
    """Print the state of the local platform and of the latest runs in its home."""
    if platform is None:
        console.print("the local platform is down (draftline up starts it)")
    else:
        console.print(f"Prefect UI {platform.ui_url}")
        for name, state in describe(settings).items():
            console.print(f"{name}: {state}")
    runs = sorted(known_runs(settings.runs_dir), key=lambda run: run.document.stat().st_mtime, reverse=True)
    if not runs:
        return
    table = Table("run", "state", *BRIEF)
    for run in runs[:_LATEST]:
        table.add_row(run.run_id, *_cells(run.report))
    console.print(table)


def _cells(path: Path) -> Sequence[str]:
    """Return what a report says, for the columns of the table; only a state where there is none to be read."""
    if not path.is_file():
        doing = _doing(RunDir(path.parent))
        return (f"no report yet; {doing}" if doing else "no report yet",)
    try:
        report = read_report(path)
    except OtherVersion:
        return ("report of another version of draftline",)
    return report.state, *brief_figures(report)


def _doing(run: RunDir) -> str:
    """Say what the run's last attempt is doing or did last, and what holds it up; nothing where none has begun."""
    attempts = run.begun_attempts()
    if not attempts:
        return ""
    state = run.attempt(attempts[-1]).state
    producer, consumer = read_progress(state / "producer.json"), read_progress(state / "consumer.json")
    try:
        advice = bottleneck_line(read_plan(run).spec, producer, consumer)
    except OtherVersion:
        advice = None
    return "; ".join(filter(None, (rollout_line(producer), advice)))
