"""The plot of a run: loss over optimizer steps, and accept length before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from disagg_core.run.metrics import read_metrics

_LOSS = "#1f5fa8"
_SMOOTH = "#0b2545"
_BARS = ("#b8c4d6", "#1f5fa8")


def plot_run(train_metrics: Path, out: Path, *, title: str, accept_lengths: Sequence[float] = ()) -> None:
    """Draw `train_metrics` (train.jsonl) and the accept lengths (before, after) into the PNG file `out`.

    Of a step that an attempt took again, the last loss counts.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = _loss_by_step(train_metrics)
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 2, width_ratios=(3, 1))
    loss_axes = figure.add_subplot(grid[0, 0])
    loss_axes.plot(steps, losses, color=_LOSS, alpha=0.3, linewidth=1, label="each step")
    loss_axes.plot(steps, _moving_mean(losses, 20), color=_SMOOTH, linewidth=1.8, label="mean of 20 steps")
    loss_axes.set(xlabel="optimizer step", ylabel="training loss", title="Loss")
    loss_axes.set_ylim(bottom=0)
    loss_axes.legend(frameon=False)
    accept_axes = figure.add_subplot(grid[0, 1])
    if accept_lengths:
        bars = accept_axes.bar(["before", "after"][: len(accept_lengths)], accept_lengths, color=_BARS, width=0.6)
        accept_axes.bar_label(bars, fmt="%.2f", padding=2)
        accept_axes.set_ylim(0, max(accept_lengths) * 1.15)
    accept_axes.set(title="Accept length", ylabel="tokens per target pass")
    for axes in (loss_axes, accept_axes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(out, dpi=130)


def _loss_by_step(train_metrics: Path) -> tuple[list[float], list[float]]:
    points: dict[float, float] = {}
    for record in read_metrics(train_metrics):
        step, loss = record.get("step"), record.get("loss")
        if isinstance(step, (int, float)) and isinstance(loss, (int, float)):
            points[float(step)] = float(loss)
    return sorted(points), [points[step] for step in sorted(points)]


def _moving_mean(values: list[float], width: int) -> list[float]:
    means = []
    total = 0.0
    for position, value in enumerate(values):
        total += value - (values[position - width] if position >= width else 0.0)
        means.append(total / min(position + 1, width))
    return means
