"""The plot of a run: loss over optimizer steps, and accept length before and after training; several drafts beside
each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from disagg_core.report.document import EvaluationFigures
from disagg_core.run.metrics import read_metrics

_LOSS = "#1f5fa8"
_SMOOTH = "#0b2545"
_BARS = ("#b8c4d6", "#1f5fa8")


def plot_run(train_metrics: Path, out: Path, *, title: str, accept_lengths: Sequence[float] = ()) -> None:
    """Draw `train_metrics` (train.jsonl) and the accept lengths (before, after), if any, into the PNG file `out`.

    Of a step that an attempt took again, the last loss counts.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = _by_step(train_metrics, "loss")
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, 2, width_ratios=(3, 1)) if accept_lengths else [figure.subplots()]
    loss_axes = axes[0]
    loss_axes.plot(steps, losses, color=_LOSS, alpha=0.3, linewidth=1, label="each step")
    loss_axes.plot(steps, _moving_mean(losses, 20), color=_SMOOTH, linewidth=1.8, label="mean of 20 steps")
    loss_axes.set(xlabel="optimizer step", ylabel="training loss", title="Loss")
    loss_axes.set_ylim(bottom=0)
    loss_axes.legend(frameon=False)
    if accept_lengths:
        bars = axes[1].bar(["before", "after"][: len(accept_lengths)], accept_lengths, color=_BARS, width=0.6)
        axes[1].bar_label(bars, fmt="%.2f", padding=2)
        axes[1].set(title="Accept length", ylabel="tokens per target pass", ylim=(0, max(accept_lengths) * 1.15))
    _save(figure, axes, out, title)


def plot_comparison(
    train_metrics: Mapping[str, Path], evaluations: Mapping[str, EvaluationFigures], out: Path, *, title: str
) -> None:
    """Draw the drafts of `train_metrics` (name to train.jsonl) and what was measured of them into the PNG file `out`.

    Losses of unlike methods cannot be compared; the accept lengths that training promises, which are drawn, can.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    training, length, position = figure.subplots(1, 3, width_ratios=(3, 2, 2))
    colours = {name: f"C{index}" for index, name in enumerate(train_metrics)}
    for name, path in train_metrics.items():
        steps, promised = _by_step(path, "simulated_accept_length")
        training.plot(steps, _moving_mean(promised, 20), color=colours[name], label=name)
    training.set(xlabel="optimizer step", ylabel="tokens per target pass", title="Training: simulated accept length")
    training.legend(frameon=False)
    for name, found in evaluations.items():
        low, high = found.interval_after or (found.accept_length_after,) * 2
        error = [[found.accept_length_after - low], [high - found.accept_length_after]]
        bars = length.bar(name, found.accept_length_after, yerr=error, color=colours[name], capsize=4, width=0.6)
        length.bar_label(bars, fmt="%.2f", padding=2)
        rates = found.per_position_after
        position.plot(range(1, len(rates) + 1), rates, marker="o", color=colours[name], label=name)
    length.margins(y=0.15)
    k = next((found.draft_tokens for found in evaluations.values()), None)
    length.set(title="Accept length, 95 % interval" + (f", k={k}" if k else ""), ylabel="tokens per target pass")
    position.set(title="Acceptance by position", xlabel="drafted token", ylabel="part of the passes", ylim=(0, 1))
    _save(figure, (training, length, position), out, title)


def _save(figure: Any, axes: Sequence[Any], out: Path, title: str) -> None:
    for part in axes:
        part.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(out, dpi=130)


def _by_step(train_metrics: Path, figure: str) -> tuple[list[float], list[float]]:
    points: dict[float, float] = {}
    for record in read_metrics(train_metrics):
        step, value = record.get("step"), record.get(figure)
        if isinstance(step, (int, float)) and isinstance(value, (int, float)):
            points[float(step)] = float(value)
    return sorted(points), [points[step] for step in sorted(points)]


def _moving_mean(values: list[float], width: int) -> list[float]:
    means = []
    total = 0.0
    for position, value in enumerate(values):
        total += value - (values[position - width] if position >= width else 0.0)
        means.append(total / min(position + 1, width))
    return means
