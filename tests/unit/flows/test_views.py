"""What people see: report, plot, plan and progress."""

from __future__ import annotations

import io
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from disagg_core.cli.plan_memory import memory_of
from disagg_core.cli.plan_view import render
from disagg_core.report import plots
from disagg_core.report.accounting import Accounting
from disagg_core.report.document import (
    AttemptFigures,
    EvaluationFigures,
    Failure,
    ProgressFigures,
    RoleFigures,
    RunReport,
    ServerFigures,
    TrainingFigures,
)
from disagg_core.report.figures import figures_of
from disagg_core.report.markdown import to_markdown
from disagg_core.report.plots import plot_run
from disagg_core.run.metrics import JsonlMetrics, read_metrics
from disagg_core.run.plan import RunPlan, make_plan
from disagg_core.run.progress import ProgressFile, read_progress
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import Settings
from disagg_core.target.facts import read_target_facts
from flows.cli import status as status_view
from flows.cli.run_view import Bars, Lines, rollout_line, summary

pytestmark = pytest.mark.unit

RUNS = Path(__file__).resolve().parents[3] / "infra" / "runs"
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def a_report(**changes: object) -> RunReport:
    fields = {
        "run_id": "demo-1",
        "name": "demo",
        "state": "completed",
        "accounting": Accounting(
            prompts=10, rejected=1, published=9, trained=9, quarantined=0, unused=0, store_keys_left=0
        ),
        "training": TrainingFigures(steps=3, samples_per_second=4.0, loss_first=6.0, loss_last=2.0),
        "evaluation": EvaluationFigures(
            draft_tokens=5,
            prompts=16,
            accept_length_before=1.01,
            accept_length_after=2.53,
            interval_after=(2.4, 2.7),
            per_position_after=[0.7, 0.5],
            lossless=True,
        ),
        "roles": {
            "producer": RoleFigures(
                flow_run_id="p", work_pool="gpu-rollout", started=NOON, ended=NOON + timedelta(0, 9)
            ),
            "consumer": RoleFigures(
                flow_run_id="c", work_pool="gpu-train", started=NOON + timedelta(0, 2), ended=NOON + timedelta(0, 12)
            ),
        },
        "archive": None,
        "attempts": [AttemptFigures(attempt=1, failure_class=None, reason="", incomplete=0)],
        "store_counters": {},
        "rejected_reasons": {"too long": 1},
        "run_dir": "runs/demo-1",
        "export": "runs/demo-1/export",
        "flow_run_id": "f",
        "seconds": 60.0,
    }
    return RunReport(**{**fields, **changes})


def text_of(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=140)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_report_says_the_identity_the_accept_length_and_the_overlap() -> None:
    report = a_report()
    markdown = to_markdown(report)
    assert "| prompts | 10 = 9 published + 1 rejected |" in markdown
    assert "| accept length, k=5 | **1.01 before, 2.53 after training (95% interval 2.40 to 2.70)" in markdown
    assert "1 x too long" in markdown
    assert "| quarantined | 2 x not finite |" in to_markdown(a_report(quarantined_reasons={"not finite": 2}))
    assert report.roles_overlap_seconds == 7
    assert RunReport.model_validate_json(report.model_dump_json()) == report


def test_the_report_names_the_servers_and_what_happened_to_them() -> None:
    died = ServerFigures(
        name="sglang-0", captured=40, failures=2, restarts=1, events=["died: killed by SIGKILL", "back"]
    )
    markdown = to_markdown(a_report(servers=[died]))
    assert "| sglang-0 | 40 | 2 | 1 | died: killed by SIGKILL; back |" in markdown
    local = died.model_copy(update={"name": "local"})
    assert "Servers" not in to_markdown(a_report(servers=[local]))


def test_the_report_of_a_failed_run_says_why_and_what_was_tried() -> None:
    report = a_report(
        state="failed",
        failure=Failure(failure_class="store_lost", message="the owner died"),
        accounting=None,
        training=None,
        evaluation=None,
        attempts=[
            AttemptFigures(attempt=1, failure_class="store_lost", reason="owner", incomplete=0),
            AttemptFigures(attempt=2, failure_class=None, reason="", incomplete=3),
        ],
    )
    markdown = to_markdown(report)
    assert "| failed (store_lost) | **the owner died** |" in markdown
    assert "1. store_lost: owner" in markdown
    assert "3 lost samples are captured again" in markdown
    assert "failed (store_lost)" in text_of(summary(report, "http://ui"))


def test_the_summary_has_the_figures_and_the_places() -> None:
    shown = text_of(summary(a_report(), "http://ui"))
    for expected in ("10 = 9 published + 1 rejected", "2.53 after training", "runs/demo-1/export", "http://ui"):
        assert expected in shown


def test_terminal_and_markdown_show_the_same_figures() -> None:
    crooked = a_report().accounting.model_copy(update={"trained": 8})
    message = "died; the end of its log:\n[red] a | b"
    report = a_report(state="failed", accounting=crooked, failure=Failure(failure_class="bug", message=message))
    markdown, shown = to_markdown(report), " ".join(columns_of(text_of(summary(report, "http://ui"))))
    rows = [tuple(cells.strip() for cells in line.strip("|").split(" | ")) for line in markdown.splitlines()]
    for figure in figures_of(report):
        assert figure.label in {row[0] for row in rows}
        assert figure.label in shown
        assert figure.value.splitlines()[-1] in shown
    assert "| failed (bug) | **died; the end of its log:<br>[red] a \\| b** |" in markdown
    assert (
        "| does not add up | **published = trained + quarantined + unused does not hold: 9 != 8 + 0 + 0** |" in markdown
    )


def columns_of(table: str) -> list[str]:
    return [cell for line in table.splitlines() for cell in columns(line)]


def test_the_summary_of_a_cancelled_run_says_how_far_it_came() -> None:
    progress = ProgressFigures(attempt=2, prompts=70, total_prompts=100, steps=2, total_steps=4, trained=56, loss=3.5)
    failure = Failure(failure_class="preempted", message="interrupted")
    report = a_report(state="cancelled", failure=failure, progress=progress, accounting=None, evaluation=None)
    shown = text_of(summary(report, "http://ui"))
    for expected in ("run demo-1: cancelled", "70 of 100", "56 in 2 of 4 steps", "interrupted"):
        assert expected in shown


def test_the_status_shows_every_run_whatever_became_of_it(tmp_path: Path) -> None:
    """One completed, one cancelled, one of another version, one without a report."""
    progress = ProgressFigures(
        attempt=1, prompts=9, total_prompts=None, steps=2, total_steps=None, trained=7, loss=None
    )
    reports = {
        "sound": a_report().model_dump_json(),
        "stopped": a_report(state="cancelled", accounting=None, training=None, progress=progress).model_dump_json(),
        "old": '{"run_id": "old"}',
        "young": None,
    }
    for name, report in reports.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
        if report is not None:
            (tmp_path / "runs" / name / "report.json").write_text(report)
    console = Console(file=io.StringIO(), width=140)

    status_view.show(Settings(home=tmp_path), None, console)

    assert isinstance(console.file, io.StringIO)
    lines = {cells[1]: cells[2:-1] for line in console.file.getvalue().splitlines() if (cells := columns(line))}
    assert lines["sound"] == ["completed", "9", "3", "1.01 to 2.53", "60"]
    assert lines["stopped"][:3] == ["cancelled", "7", "2"]
    assert lines["old"][0] == "report of another version of draftline"
    assert lines["young"][0] == "no report yet"


def test_the_status_and_the_progress_of_a_run_say_what_holds_it_up_and_for_how_long(tmp_path: Path) -> None:
    spec = load_spec(RUNS / "qwen3-8b-eagle3.yaml")
    root = tmp_path / "runs" / "young"
    plan = make_plan(spec, read_target_facts(spec.target), run_id="young", root=root, total_prompts=100)
    state = plan.dir.attempt(1).state
    ProgressFile(state / "producer.json").update(phase="capturing", share_space=0.0, left_s=60, infer_capacity=18.5)
    ProgressFile(state / "consumer.json").update(
        phase="training", step=3, share_refs=0.38, share_forward=0.3, train_capacity=30.0, left_s=600
    )
    plan.dir.document.write_text(plan.model_dump_json())
    status, lines = (Console(file=io.StringIO(), width=400) for _ in range(2))

    status_view.show(Settings(home=tmp_path), None, status)
    with Lines(lines) as shown:
        shown.show("Running", plan, read_progress(state / "producer.json"), read_progress(state / "consumer.json"))

    for console in (status, lines):
        assert isinstance(console.file, io.StringIO)
        told = console.file.getvalue()
        assert "inference-bound: training waits 38% for features" in told
        assert "(capture 18.5, training 30.0 samples/s at most)" in told
        assert "10 min left" in told


def columns(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("│")] if line.startswith("│") else []


def test_the_plan_names_pools_gpus_and_bytes() -> None:
    spec = load_spec(RUNS / "qwen3-8b-eagle3.yaml")
    plan = make_plan(spec, read_target_facts(spec.target), run_id="x", root=Path("x"), total_prompts=2800)
    shown = text_of(render(plan))
    for expected in ("gpu-rollout", "gpu-train", "32773", "128.0 MiB", "28 samples = 7 ranks x 1 x 4", "64.0 GiB"):
        assert expected in shown
    assert re.search(r"optimizer steps +│ 100 ", shown)
    assert plan.staging_bytes == 386 << 20  # three samples of 128 MiB and a little
    assert "up to 772.0 MiB in each SGLang server and in each of 7 ranks" in shown


def test_the_plan_says_what_each_kind_of_draft_costs() -> None:
    shown = {}
    for method in ("eagle3", "dflash2", "dspark"):
        spec = load_spec(RUNS / f"qwen3-8b-{method}.yaml")
        facts = read_target_facts(spec.target)
        plan = make_plan(spec, facts, run_id="x", root=Path("x"), total_prompts=2800)
        shown[method] = dict(
            cells[1:3] for line in text_of(render(plan)).splitlines() if len(cells := columns(line)) > 2
        )
    assert shown["eagle3"]["draft parameters"] == "399,523,840"
    assert shown["eagle3"]["rows of logits per step"] == "up to 801,836, 28,637 of each sample, 32,000 wide"
    assert shown["dflash2"]["rows of logits per step"] == "up to 100,352, 3,584 of each sample, 151,936 wide"
    assert shown["dspark"]["bytes per token that it reads"] == "49157"
    for lines in shown.values():
        assert lines["embedding and LM head of the target"] == "2.3 GiB on each rank"


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    with JsonlMetrics(tmp_path / "train.jsonl") as metrics:
        for step in range(1, 40):
            metrics.write(step=step, loss=6.0 / step)
    plot_run(tmp_path / "train.jsonl", tmp_path / "x.png", title="t", accept_lengths=(1.0, 2.5))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_step_that_was_taken_again_is_drawn_once(tmp_path: Path) -> None:
    with JsonlMetrics(tmp_path / "train.jsonl") as metrics:
        for step, loss in ((1, 6.0), (2, 5.0), (3, 4.5), (2, 5.1), (3, 4.4)):
            metrics.write(step=step, loss=loss)
    assert plots._by_step(tmp_path / "train.jsonl", "loss") == ([1.0, 2.0, 3.0], [6.0, 5.1, 4.4])


def test_a_torn_last_metric_is_left_out(tmp_path: Path) -> None:
    with JsonlMetrics(tmp_path / "m.jsonl") as metrics:
        metrics.write(step=1)
    with (tmp_path / "m.jsonl").open("ab") as file:
        file.write(b'{"step": 2')
    assert [record["step"] for record in read_metrics(tmp_path / "m.jsonl")] == [1]
    assert list(read_metrics(tmp_path / "none.jsonl")) == []


def test_progress_is_written_at_most_once_an_interval(tmp_path: Path) -> None:
    now = [0.0]
    progress = ProgressFile(tmp_path / "p.json", interval_s=1.0, clock=lambda: now[0])
    progress.update(step=1)
    now[0] = 0.5
    progress.update(step=2)
    assert read_progress(tmp_path / "p.json")["step"] == 1
    now[0] = 1.0
    progress.update(loss=0.5)
    assert read_progress(tmp_path / "p.json").items() >= {"step": 2, "loss": 0.5}.items()


def test_a_pipe_gets_lines_and_a_terminal_gets_bars() -> None:
    producer = {
        "phase": "capturing",
        "prompts": 12,
        "published": 11,
        "rejected": 1,
        "samples_per_s": 3.0,
        "in_flight": 4,
    }
    consumer = {"phase": "training", "step": 2, "loss": 3.25, "samples_per_s": 2.0}
    for view, terminal in ((Lines, False), (Bars, True)):
        console = Console(file=io.StringIO(), width=160, force_terminal=terminal)
        with view(console) as shown:
            shown.show("Running", None, {}, {})
            shown.show("Completed", None, producer, consumer)
        assert isinstance(console.file, io.StringIO)
        assert "loss 3.250" in console.file.getvalue()


def test_the_counting_of_continuations_is_shown_with_rate_and_time_left() -> None:
    phase = "continuing 256 of 512 prompts for the vocabulary map"
    state = {"phase": phase, "counted": 256, "of": 512, "samples_per_s": 0.8, "left_s": 320}
    assert rollout_line(state) == f"{phase}, 0.8/s, 5 min left"
    assert rollout_line({**state, "left_s": 40}) == f"{phase}, 0.8/s, 40 s left"
    assert rollout_line({**state, "samples_per_s": None, "left_s": None}) == phase
    assert rollout_line({**state, "samples_per_s": 0.03}) == f"{phase}, 1.8/min, 5 min left"


def test_the_plan_says_what_memory_each_process_takes() -> None:
    spec = load_spec(RUNS / "demo.yaml", [])
    plan = make_plan(spec, read_target_facts(spec.target), run_id="x", root=Path("x"), total_prompts=2800)
    producer, trainer = memory_of(plan)
    assert dict(producer.parts)["target weights"] == pytest.approx(4 * 1.05e6, rel=0.05)
    assert producer.total == sum(size for _, size in producer.parts)
    half = plan.model_copy(update={"spec": load_spec(RUNS / "demo.yaml", ["rollout.batch_tokens=2048"])})
    assert 2 * dict(memory_of(half)[0].parts)["batch"] == pytest.approx(dict(producer.parts)["batch"], rel=0.05)
    shown = text_of(render(plan))
    assert "Memory, estimated" in shown
    assert "samples fetched ahead" in shown
    assert dict(trainer.parts)["samples fetched ahead"] == spec.training.prefetch_samples * plan.max_sample_bytes
    window = spec.training.batch_size * spec.training.accumulation_steps * plan.max_sample_bytes
    assert dict(trainer.parts)["batches of a step and of the next one"] == pytest.approx(2 * window, rel=0.01)


def test_the_plan_knows_what_the_optimizer_keeps_and_where() -> None:
    def plan_with(*overrides: str) -> RunPlan:
        spec = load_spec(RUNS / "qwen3-8b-dflash2.yaml", overrides)
        return make_plan(spec, read_target_facts(spec.target), run_id="x", root=Path("x"), total_prompts=2800)

    def optimizer_of(*overrides: str) -> dict[str, int]:
        parts = dict(memory_of(plan_with(*overrides))[1].parts)
        return {what: size for what, size in parts.items() if "drafts" in what or "optimizer" in what}

    (adamw,) = optimizer_of().values()
    (muon,) = optimizer_of("training.optimizer=muon").values()
    offloaded = optimizer_of("training.optimizer_offload=true")
    assert 3 / 4 * adamw < muon < adamw
    assert offloaded["optimizer, in host memory"] == pytest.approx(adamw / 2, abs=1)
    assert offloaded["drafts, gradients"] < adamw
    shown = text_of(render(plan_with("training.optimizer_offload=true")))
    assert "optimizer, in host memory" in shown
    assert "a checkpoint on the disk" in shown


def test_the_plan_knows_what_of_a_shared_sample_and_of_a_checkpoint_a_rank_has() -> None:
    def parts_of(*overrides: str) -> dict[str, int]:
        spec = load_spec(RUNS / "qwen3-8b-dflash2.yaml", ["training.processes=6", *overrides])
        plan = make_plan(spec, read_target_facts(spec.target), run_id="x", root=Path("x"), total_prompts=2800)
        return dict(memory_of(plan)[1].parts)

    alone, in_pairs, all_of_them = (parts_of(f"training.context_parallel={count}") for count in (1, 2, 6))
    batches, staged = "batches of a step and of the next one", "checkpoint on its way to the disk"
    assert in_pairs[batches] == alone[batches], "what a rank computes and what it makes keys of may be all of a sample"
    assert all_of_them[batches] == alone[batches] // 3
    assert alone["drafts, gradients, optimizer"] == pytest.approx(4 / 3 * alone[staged], abs=1)
    muon = parts_of("training.optimizer=muon")
    assert 2 / 3 * alone[staged] < muon[staged] < alone[staged]


def test_rates_are_shown_while_there_are_any() -> None:
    """Neither before the first sample nor after the last, when they would be the last ones that were written."""
    rates = {"samples_per_s": 3.0, "in_flight": 4, "loss": 3.25}
    console = Console(file=io.StringIO(), width=160)
    with Lines(console) as shown:
        shown.show("Pending", None, {"phase": "loading the target"}, {"phase": "waiting for the vocabulary map"})
        shown.show("Running", None, {"phase": "ended", **rates}, {"phase": "finished", **rates})
        shown.show("Failed", None, {"phase": "ended", **rates}, {"phase": "finished", **rates})
    assert isinstance(console.file, io.StringIO)
    waiting, judging, failed = (line.split("rollout - ")[1] for line in console.file.getvalue().splitlines())
    assert waiting == "loading the target  training - waiting for the vocabulary map"
    assert judging == "ended  training - finished, the draft is being judged"
    assert failed == "ended  training - finished"
