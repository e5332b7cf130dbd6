"""Ranks that share samples: what the document allows, which methods can, and what the plan says of it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from rich.console import Console

from disagg_core.cli.plan_view import render
from disagg_core.drafts.registry import method_of
from disagg_core.errors import BadInput, SpecError
from disagg_core.run.plan import RunPlan, make_plan
from disagg_core.run_spec.document import RunSpec, TrainingSection
from disagg_core.target.facts import read_target_facts

pytestmark = pytest.mark.unit

RUNS = Path(__file__).resolve().parents[3] / "infra" / "runs"
DFLASH = {"method": "dflash", "mask_token_id": 3, "block_size": 8, "num_layers": 2}


def plan_of(*drafts: dict[str, Any], **training: Any) -> RunPlan:
    document = yaml.safe_load((RUNS / "demo.yaml").read_text())
    del document["draft"]
    for section, key in (("target", "model"), ("data", "prompts"), ("data", "holdout")):
        document[section][key] = str((RUNS / document[section][key]).resolve())
    document["training"] |= training
    spec = RunSpec.model_validate(document | {"drafts": list(drafts)})
    return make_plan(spec, read_target_facts(spec.target), run_id="x", root=Path("x"), total_prompts=2400)


def test_ranks_that_share_samples_are_one_part_of_the_global_batch() -> None:
    alone = plan_of({"method": "eagle3"}, processes=2)
    shared = plan_of({"method": "eagle3"}, processes=4, context_parallel=2)

    assert shared.spec.global_batch_size == alone.spec.global_batch_size
    assert shared.total_steps == alone.total_steps


@pytest.mark.parametrize(
    ("training", "complaint"),
    [
        ({"processes": 3, "context_parallel": 2}, r"divides the number of ranks, processes x nodes \(3\), found 2"),
        ({"context_parallel": 2}, r"processes x nodes \(1\), found 2"),
        ({"processes": 2, "context_parallel": 2, "packing": False}, "expected packed micro-batches"),
    ],
)
def test_what_cannot_take_effect_is_refused(training: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        TrainingSection(**training)


def test_a_method_that_cannot_share_samples_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method_of("dflash"), "context_parallel", False)
    with pytest.raises(SpecError, match=r"expected 1 with draft\.method dflash.*found 2; methods that can: eagle3"):
        plan_of(DFLASH, processes=2, context_parallel=2)
    with pytest.raises(BadInput, match=r"dflash: training\.context_parallel: expected 1"):
        plan_of({"method": "eagle3"}, DFLASH, processes=2, context_parallel=2)


def test_the_plan_says_who_shares_samples() -> None:
    printed = io.StringIO()
    plan = plan_of({"method": "eagle3"}, processes=4, context_parallel=2, batch_size=3)

    Console(file=printed, width=160).print(render(plan))

    assert "1 node(s) of 4, 2 share each sample" in printed.getvalue()
    assert f"{plan.spec.global_batch_size} samples = 4 ranks / 2 x 3 x" in printed.getvalue()
