"""``draftline run``: check, bring the platform up, submit, follow, sum up, and leave nothing behind."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING
from uuid import UUID

from rich.console import Console

from disagg_core.observability.progress import read_progress
from disagg_core.plan import RunPlan, run_id_of
from disagg_core.preflight import check_run
from disagg_core.report import RunReport
from disagg_core.run_dir import RunDir
from disagg_core.run_spec import RunSpec
from disagg_core.settings import Settings
from flows import local
from flows.run_view import Bars, Lines, RoleState, summary

if TYPE_CHECKING:
    from flows.submission import RunState

_POLL_S = 0.5
INTERRUPTED = 130


def run_training(spec: RunSpec, settings: Settings, console: Console, *, keep_up: bool) -> int:
    """Run one training; return the exit code: 0 completed, 1 failed, 130 interrupted (Ctrl-C or SIGTERM).

    Raises:
        BadInput: something in the spec or its files is wrong; nothing was started.
    """
    check_run(spec, settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    was_up = local.find_platform(settings) is not None
    try:
        platform = local.up(settings, console.print)
        from flows import submission

        flow_run_id = submission.submit(spec)
        run_dir = RunDir.of(settings.runs_dir, run_id_of(spec, flow_run_id))
        console.print(f"run {run_dir.root.name}: {platform.run_url(flow_run_id)}")
        try:
            state = _follow(flow_run_id, run_dir, console)
        except KeyboardInterrupt:
            console.print("interrupted: cancelling the run")
            submission.cancel(flow_run_id)
            return INTERRUPTED
        stays = was_up or keep_up
        return _sum_up(run_dir, state, platform.run_url(flow_run_id) + ("" if stays else " (draftline up)"), console)
    finally:
        if not (was_up or keep_up):
            local.down(settings, lambda _: None)


def _follow(flow_run_id: UUID, run_dir: RunDir, console: Console) -> RunState:
    """Show the progress of both roles until the run has ended; return its final state."""
    from flows import submission

    plan: RunPlan | None = None
    with Bars(console) if console.is_terminal else Lines(console) as view:
        while True:
            state = submission.read_state(flow_run_id)
            if plan is None and run_dir.document.is_file():
                plan = RunPlan.model_validate_json(run_dir.document.read_bytes())
            view.show(state.name, plan, *_role_states(run_dir))
            if state.final:
                return state
            time.sleep(_POLL_S)


def _role_states(run_dir: RunDir) -> tuple[RoleState, RoleState]:
    attempts = sorted(int(path.name) for path in (run_dir.root / "attempts").glob("[0-9]*"))
    if not attempts:
        return {}, {}
    state = run_dir.attempt(attempts[-1]).state
    return read_progress(state / "producer.json"), read_progress(state / "consumer.json")


def _sum_up(run_dir: RunDir, state: RunState, ui: str, console: Console) -> int:
    """Print the summary, or what went wrong and where to look; return the exit code."""
    if run_dir.report.is_file():
        console.print(summary(RunReport.model_validate_json(run_dir.report.read_bytes()), ui))
    else:
        console.print(f"[bold red]{state.name}[/]: {state.message}".replace("[/]:", "[/]:", 1))
        console.print(f"logs: {run_dir.root}/attempts/*/logs   UI: {ui}")
    return 0 if state.completed else 1
