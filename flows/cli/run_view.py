"""What a person sees of a run in the terminal: progress of both roles while it lasts, a summary at its end."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from disagg_core.report.document import RunReport
from disagg_core.report.figures import Figure, figures_of
from disagg_core.run.bottleneck import bottleneck_line, describe_left
from disagg_core.run.plan import RunPlan
from disagg_core.run.progress import ProgressValue

_LINE_INTERVAL_S = 10.0
_SLOW = 0.1
"""Samples a second; what goes slower is said by the minute."""
_STYLES = {"plain": "", "strong": "bold", "alarm": "bold red"}

RoleState = dict[str, ProgressValue]


class _BarsAndAdvice(Progress):
    """Progress bars, and a line below them that says what holds the run up."""

    advice = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bars, then the line."""
        yield self.make_tasks_table(self.tasks)
        if self.advice:
            yield Text(self.advice, style="dim")


class Bars:
    """Progress bars, for a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = _BarsAndAdvice(
            TextColumn("{task.description:<9}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._rollout: TaskID = self._progress.add_task("rollout", total=None, detail="")
        self._training: TaskID = self._progress.add_task("training", total=None, detail="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, state: str, plan: RunPlan | None, producer: RoleState, consumer: RoleState) -> None:
        """Move both bars."""
        self._progress.update(
            self._rollout,
            total=plan.total_prompts if plan else None,
            completed=_number(producer, "prompts"),
            detail=_rollout_detail(state, producer),
        )
        self._progress.update(
            self._training,
            total=plan.total_steps if plan else None,
            completed=_number(consumer, "step"),
            detail=_training_detail(state, producer, consumer),
        )
        self._progress.advice = (bottleneck_line(plan.spec, producer, consumer) if plan else None) or ""


class Lines:
    """A line when the state changes and every ten seconds, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._last_state = ""
        self._last_line = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def show(self, state: str, plan: RunPlan | None, producer: RoleState, consumer: RoleState) -> None:
        """Print a line if one is due."""
        now = time.monotonic()
        if state == self._last_state and now - self._last_line < _LINE_INTERVAL_S:
            return
        self._last_state, self._last_line = state, now
        prompts = f"{_number(producer, 'prompts'):.0f}/{plan.total_prompts or '?'}" if plan else "-"
        steps = f"{_number(consumer, 'step'):.0f}/{plan.total_steps or '?'}" if plan else "-"
        self._console.print(
            f"{now - self._began:5.0f} s  {state:<10} rollout {prompts} {_rollout_detail('', producer)}  "
            f"training {steps} {_training_detail(state, producer, consumer)}"
        )
        if plan and (advice := bottleneck_line(plan.spec, producer, consumer)):
            self._console.print(f"{'':9}{advice}")


def _number(state: RoleState, name: str) -> float:
    value = state.get(name)
    return float(value) if isinstance(value, (int, float)) else 0.0


def rollout_line(state: RoleState) -> str:
    """Say in one line what a producer is doing, with rate and time left where they are known."""
    return _rollout_detail("", state)


def _rollout_detail(flow_state: str, state: RoleState) -> str:
    if not state:
        return flow_state
    if state.get("phase") == "ended":
        return "ended"
    in_flight = f", in flight {_number(state, 'in_flight'):.0f}" if "in_flight" in state else ""
    return f"{state.get('phase', '')}{_rate(state)}{_left(state)}{in_flight}"


def _training_detail(flow_state: str, producer: RoleState, state: RoleState) -> str:
    if not state:
        return ""
    if state.get("phase") == "finished":
        done = producer.get("phase") == "ended" and flow_state == "Running"
        return "finished, the draft is being judged" if done else "finished"
    losses = {name: value for name, value in state.items() if name.split(" ")[0] in ("loss", "heldout_loss")}
    shown = "".join(
        f", {name.replace('heldout_', 'held-out ')} {value:.3f}"
        for name, value in losses.items()
        if isinstance(value, float)
    )
    return f"{state.get('phase', '')}{shown}{_rate(state)}{_left(state)}"


def _rate(state: RoleState) -> str:
    rate = state.get("samples_per_s")
    if not isinstance(rate, (int, float)):
        return ""
    return f", {rate:.1f}/s" if rate >= _SLOW else f", {60 * rate:.1f}/min"


def _left(state: RoleState) -> str:
    """Say how long what is under way will take, where that is known."""
    left = state.get("left_s")
    return f", {describe_left(left)}" if isinstance(left, (int, float)) and left > 0 else ""


def summary(report: RunReport, ui: str) -> Table:
    """Return the summary of a finished run."""
    table = Table(title=f"run {report.run_id}: {report.state}", show_header=False, title_justify="left", min_width=70)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for figure in [*figures_of(report), Figure("UI", ui)]:
        table.add_row(figure.label, Text(figure.value, style=_STYLES[figure.weight]))
    return table
