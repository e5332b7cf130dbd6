"""``draftline run``: check, bring the platform up, submit, follow, sum up, and leave nothing behind."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

import httpx
from rich.console import Console
from rich.markup import escape

from disagg_core.checks.preflight import check_gpus, check_run
from disagg_core.checks.repeat import check_repeats
from disagg_core.report.document import EndState
from disagg_core.report.records import read_report
from disagg_core.run.directory import RunDir
from disagg_core.run.known import read_plan
from disagg_core.run.plan import RunPlan, run_id_of
from disagg_core.run.progress import read_progress
from disagg_core.run_spec.document import RunSpec
from disagg_core.settings import Settings
from flows.cli.run_view import Bars, Lines, RoleState, summary
from flows.platform import local
from tasks.interruption import end_interrupted

if TYPE_CHECKING:
    from flows.platform.submission import RunState

_POLL_S = 0.5
_SERVER_AWAY_S = 300.0
INTERRUPTED = 130


def run_training(
    spec: RunSpec, settings: Settings, console: Console, *, keep_up: bool, repeats: RunPlan | None = None
) -> int:
    """Run one training; return the exit code: 0 completed, 1 failed, 130 interrupted (Ctrl-C or SIGTERM).

    With `repeats` it has to meet what that run was planned with.

    Raises:
        BadInput: something in the spec or its files is wrong; nothing was started.
        NotRepeatable: target, tokenizer or data are not those of `repeats`.
    """
    planned = check_run(spec, settings)
    if repeats is not None:
        check_repeats(repeats, planned)
    check_gpus(spec)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run: _Submitted | None = None
    try:
        with local.exclusive(settings):
            platform = local.up(settings, console.print, keep=keep_up)
        run = _submit(spec, settings, platform)
        console.print(f"run {run.dir.root.name}: {platform.run_url(run.id)}")
        state = _follow(run, console, lambda: local.require_members(settings, console.print))
        return _sum_up(run, state, console)
    except KeyboardInterrupt:
        _end_uninterrupted()
        console.print("interrupted: cancelling the run")
        if run is not None:
            _cancel(run, console)
        return INTERRUPTED
    except local.PlatformError as error:
        if run is not None:
            end_interrupted(run.dir, "crashed", str(error), str(run.id))
        raise
    finally:
        _end_uninterrupted()
        local.leave(settings)


@dataclass(frozen=True)
class _Submitted:
    """A run of ours on the platform; `ui` says where its page is, also when the platform will be gone."""

    id: UUID
    dir: RunDir
    ui: str


def _submit(spec: RunSpec, settings: Settings, platform: local.LocalPlatform) -> _Submitted:
    from flows.platform import submission

    flow_run_id = submission.submit(spec)
    run_dir = RunDir.of(settings.runs_dir, run_id_of(spec, flow_run_id))
    page = platform.run_url(flow_run_id)
    if not platform.kept:  # the next one may have another port
        page = f"draftline up, then {page.removeprefix(platform.ui_url)}"
    return _Submitted(flow_run_id, run_dir, page)


def _end_uninterrupted() -> None:
    """Ignore signals until this process ends: a second Ctrl-C must not cut the teardown short."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _cancel(run: _Submitted, console: Console) -> None:
    """Cancel the run, wait for its end, and sum up how far it came."""
    from flows.platform import submission

    try:
        submission.cancel(run.id)
    except httpx.HTTPError as error:
        console.print(f"the Prefect server does not answer ({error}); draftline down stops what is left")
    _sum_up(run, submission.RunState("Cancelled", "interrupted", final=True, completed=False), console)


def _follow(run: _Submitted, console: Console, require_members: Callable[[], None]) -> RunState:
    """Show the progress of both roles until the run has ended; return its final state.

    Raises:
        PlatformError: the server has ended, or has not answered for `_SERVER_AWAY_S`.
    """
    from flows.platform import submission

    plan: RunPlan | None = None
    answered = time.monotonic()
    with Bars(console) if console.is_terminal else Lines(console) as view:
        while True:
            state = submission.read_state(run.id)
            require_members()
            if state is not submission.UNREACHABLE:
                answered = time.monotonic()
            elif time.monotonic() - answered > _SERVER_AWAY_S:
                raise local.PlatformError(f"the Prefect server has not answered for {_SERVER_AWAY_S:.0f} s")
            if plan is None and run.dir.document.is_file():
                plan = read_plan(run.dir)
            view.show(state.name, plan, *_role_states(run.dir))
            if state.final:
                return state
            time.sleep(_POLL_S)


def _role_states(run_dir: RunDir) -> tuple[RoleState, RoleState]:
    attempts = run_dir.begun_attempts()
    if not attempts:
        return {}, {}
    state = run_dir.attempt(attempts[-1]).state
    return read_progress(state / "producer.json"), read_progress(state / "consumer.json")


def _sum_up(run: _Submitted, state: RunState, console: Console) -> int:
    """Print the summary, or what went wrong and where to look; return the exit code."""
    if state.completed and not run.dir.report.is_file():  # a night without anything new
        console.print(f"{state.name}: {escape(state.message)}")
        return 0
    ends: dict[str, EndState] = {"Cancelled": "cancelled", "Crashed": "crashed"}
    end_interrupted(run.dir, ends.get(state.name, "failed"), state.message or state.name, str(run.id))
    if run.dir.report.is_file():
        console.print(summary(read_report(run.dir.report), run.ui))
    else:
        console.print(f"[bold red]{state.name}[/]: {escape(state.message)}")
        console.print(f"UI: {run.ui}")
    return 0 if state.completed else 1
