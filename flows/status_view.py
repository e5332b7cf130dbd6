"""``draftline status``: the platform's processes and the latest runs."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from disagg_core.report import RunReport
from disagg_core.settings import Settings
from flows.local import LocalPlatform, describe

_LATEST = 10


def show(settings: Settings, platform: LocalPlatform | None, console: Console) -> None:
    """Print the state of the local platform and of the latest runs in its home."""
    if platform is None:
        console.print("the local platform is down (draftline up starts it)")
    else:
        console.print(f"Prefect UI {platform.ui_url}")
        for name, state in describe(settings).items():
            console.print(f"{name}: {state}")
    runs = sorted(settings.runs_dir.glob("*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    if not runs:
        return
    table = Table("run", "state", "trained", "steps", "accept length", "seconds")
    for document in runs[:_LATEST]:
        report = document.parent / "report.json"
        if not report.is_file():
            table.add_row(document.parent.name, "running or ended without a report", "", "", "", "")
            continue
        r = RunReport.model_validate_json(report.read_bytes())
        table.add_row(
            r.run_id,
            r.state,
            str(r.accounting.trained) if r.accounting else "",
            str(r.training.steps) if r.training else "",
            f"{r.evaluation.accept_length_before:.2f} to {r.evaluation.accept_length_after:.2f}"
            if r.evaluation
            else "",
            f"{r.seconds:.0f}",
        )
    console.print(table)
