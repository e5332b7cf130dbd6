"""The gate judges by what the evaluation measured of each suite, prompt by prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from disagg_core.errors import SpecError
from disagg_core.recurring.candidate import INCUMBENT, Incumbent
from disagg_core.recurring.promotion import judge
from disagg_core.registry.versions import Provenance, Version
from disagg_core.run.plan import RunPlan, make_plan
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.target.facts import read_target_facts

pytestmark = pytest.mark.unit

RUNS = Path(__file__).resolve().parents[3] / "infra" / "runs"
SUITES = (
    "registry.publish=true",
    "evaluation.min_accept_length=null",
    "evaluation.suites.math=math.jsonl",
    "evaluation.suites.chat=chat.jsonl",
)


def plan_of(root: Path, *overrides: str) -> RunPlan:
    spec = load_spec(RUNS / "qwen3-8b-eagle3.yaml", [*SUITES, *overrides])
    return make_plan(spec, read_target_facts(spec.target), run_id="run", root=root, total_prompts=100)


def measured(plan: RunPlan, name: str, **tokens: int) -> None:
    """Leave a result in which ten passes of each of twelve prompts gave so many tokens, by suite."""
    held_out = tokens.pop("held_out")
    suites = {suite: {"by_question": [[count, 10]] * 12 + [[0, 0]]} for suite, count in tokens.items()}
    result: dict[str, Any] = {"by_prompt": [[held_out, 10]] * 12, "lossless": True, "suites": suites}
    plan.dir.evaluation.mkdir(parents=True, exist_ok=True)
    (plan.dir.evaluation / f"{name}.json").write_text(json.dumps(result))


def a_version(number: int) -> Version:
    return Version.model_construct(number=number, provenance=Provenance.model_construct())


@pytest.mark.parametrize(
    ("named", "decision", "looked_at"),
    [
        ([], "rejected", ["all", "chat", "held-out", "math"]),
        (["math", "held-out"], "promoted", ["all", "math", "held-out"]),
        (["chat"], "rejected", ["all", "chat"]),
    ],
)
def test_the_gate_judges_by_the_suites_that_it_names(
    tmp_path: Path, named: list[str], decision: str, looked_at: list[str]
) -> None:
    plan = plan_of(tmp_path, f"gate.suites={json.dumps(named)}")
    measured(plan, "after", held_out=22, math=25, chat=18)
    measured(plan, INCUMBENT, held_out=20, math=20, chat=20)

    found = judge(plan, a_version(2), Incumbent(1, tmp_path), replaces=1).gate

    assert found.decision == decision, found.reasons
    assert [suite.suite for suite in found.suites] == looked_at
    by_suite = {suite.suite: suite for suite in found.suites}
    if "chat" in by_suite:
        assert by_suite["chat"].prompts == 12, "what was skipped says nothing"
        assert by_suite["chat"].gain == pytest.approx(-0.1)
        assert any("gain on chat -10.0%" in reason for reason in found.reasons)


def test_the_first_draft_is_measured_by_suite_too(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    measured(plan, "after", held_out=22, math=25, chat=18)

    found = judge(plan, a_version(1), None, replaces=None).gate

    assert found.decision == "promoted"
    assert {suite.suite: suite.candidate for suite in found.suites}["math"] == 2.5


def test_a_suite_that_nobody_measures_is_refused_with_the_document(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"gate\.suites: .*measured \(held-out, math, chat\), found mt_bench"):
        plan_of(tmp_path, 'gate.suites=["mt_bench", "math"]')
    with pytest.raises(SpecError, match=r"suites: expected other names than held-out and all, found all"):
        plan_of(tmp_path, "evaluation.suites.all=x.jsonl")
