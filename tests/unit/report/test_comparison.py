"""Several drafts beside each other: in the report's table, its figures, its picture and the terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from disagg_core.report.comparison import HEAD, comparison_of
from disagg_core.report.document import DraftFigures, EvaluationFigures, RunReport, TrainingFigures
from disagg_core.report.figures import brief_figures, figures_of
from disagg_core.report.markdown import to_markdown
from disagg_core.report.plots import plot_comparison
from disagg_core.run.metrics import JsonlMetrics
from flows.cli.run_view import summary

pytestmark = pytest.mark.unit


def measured(length: float, *, lossless: bool = True) -> EvaluationFigures:
    return EvaluationFigures(
        draft_tokens=7,
        prompts=32,
        accept_length_before=1.0,
        accept_length_after=length,
        interval_after=(length - 0.2, length + 0.2),
        per_position_after=[0.7, 0.4, 0.2],
        lossless=lossless,
        tokens_per_second=123.4,
    )


def draft(name: str, title: str, **changes: object) -> DraftFigures:
    values = {
        "name": name,
        "method": name,
        "title": title,
        "parameters": 410112,
        "steps": 300,
        "skipped": 0,
        "seconds": 60.0,
        "loss_first": 6.0,
        "loss_last": 2.0,
        "evaluation": measured(2.5),
    }
    return DraftFigures(**{**values, **changes})


def report_of(*drafts: DraftFigures) -> RunReport:
    return RunReport(
        run_id="compare-1",
        name="compare",
        state="completed",
        accounting=None,
        training=TrainingFigures(steps=300, samples_per_second=4.0, loss_first=None, loss_last=None),
        evaluation=None,
        drafts=list(drafts),
        roles={},
        archive=None,
        attempts=[],
        store_counters={},
        rejected_reasons={},
        run_dir="runs/compare-1",
        export=None,
        flow_run_id="f",
        seconds=60.0,
    )


BOTH = (
    draft("eagle3", "EAGLE-3"),
    draft("dflash", "DFlash", skipped=2, steps=298, evaluation=measured(1.875, lossless=False)),
)


def test_the_table_has_a_row_for_each_draft() -> None:
    first, second = comparison_of(report_of(*BOTH))

    assert len(first) == len(HEAD)
    assert first == (
        "EAGLE-3",
        "410,112",
        "6.000 to 2.000",
        "2.50 (2.30 to 2.70)",
        "0.70, 0.40, 0.20",
        "123",
        "0.200",
    )
    assert second[2:4] == ("6.000 to 2.000, 2 windows skipped", "1.88 (1.68 to 2.08), not lossless")
    renamed = draft("wide", "DFlash", method="dflash", evaluation=None)
    assert comparison_of(report_of(BOTH[0], renamed))[1][0] == "wide (DFlash)"


def test_a_run_with_one_draft_has_nothing_to_compare() -> None:
    report = report_of(BOTH[0])
    assert comparison_of(report) == []
    assert "## Drafts" not in to_markdown(report)
    assert not [figure for figure in figures_of(report) if figure.label.startswith("draft ")]


def test_markdown_terminal_and_table_of_runs_show_every_draft() -> None:
    report = report_of(*BOTH)

    markdown = to_markdown(report)
    assert "## Drafts" in markdown
    assert "| EAGLE-3 | 410,112 | 6.000 to 2.000 | 2.50 (2.30 to 2.70) |" in markdown
    console = Console(file=io.StringIO(), width=160)
    console.print(summary(report, "http://ui"))
    shown = console.file.getvalue()
    assert "draft eagle3" in shown
    assert "accept length (95 %) 2.50 (2.30 to 2.70)" in shown
    assert "no, dflash changes the output" in shown
    assert "eagle3 2.50, dflash 1.88" in brief_figures(report)
    assert RunReport.model_validate_json(report.model_dump_json()) == report


def test_the_picture_has_what_there_is(tmp_path: Path) -> None:
    files = {found.name: tmp_path / found.name / "train.jsonl" for found in BOTH}
    with JsonlMetrics(files["eagle3"]) as metrics:
        for step in range(1, 40):
            metrics.write(step=step, loss=6.0 / step, simulated_accept_length=1.0 + step / 40)
    for evaluations in ({}, report_of(*BOTH).evaluations):
        plot_comparison(files, evaluations, tmp_path / "x.png", title="t")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
