"""The run document: what is wrong is said at once, with the place and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from disagg_core.errors import SpecError, TargetError
from disagg_core.run.plan import RunPlan, make_plan
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.target.facts import read_target_facts

pytestmark = pytest.mark.unit

RUNS = Path(__file__).resolve().parents[3] / "infra" / "runs"
MINIMAL = {"target": {"model": "./target"}, "data": {"prompts": "prompts.jsonl"}}


def write(folder: Path, document: object) -> Path:
    path = folder / "spec.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return path


def test_paths_are_relative_to_the_document_and_hub_ids_are_left_alone(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, MINIMAL))
    assert spec.target.model == str(tmp_path / "target")
    assert spec.data.prompts == str(tmp_path / "prompts.jsonl")
    hub = load_spec(write(tmp_path, MINIMAL | {"target": {"model": "Qwen/Qwen3-8B"}}))
    assert hub.target.model == "Qwen/Qwen3-8B"


def test_overrides_reach_any_depth(tmp_path: Path) -> None:
    spec = load_spec(
        write(tmp_path, MINIMAL),
        ["training.max_steps=7", "data.generate.max_new_tokens=9", "store.capacity=1GiB", "run.name=night"],
    )
    assert spec.training.max_steps == 7
    assert spec.data.generate is not None
    assert spec.data.generate.max_new_tokens == 9
    assert spec.store.capacity == 1024**3
    assert spec.run.name == "night"


@pytest.mark.parametrize(
    ("document", "overrides", "complaint"),
    [
        (MINIMAL | {"trainng": {}}, [], "trainng: unknown key; did you mean training"),
        (MINIMAL | {"training": {"max_step": 3}}, [], "training.max_step: unknown key; did you mean max_steps"),
        (MINIMAL | {"training": {"max_steps": "many"}}, [], "training.max_steps: .*found 'many'"),
        (MINIMAL | {"store": {"capacity": "9 parsecs"}}, [], "store.capacity: expected a size"),
        ({"data": {"prompts": "p"}}, [], "target: missing"),
        ([1, 2], [], "expected sections"),
        ("run: [", [], "not valid YAML"),
        (MINIMAL, ["max_steps=3"], "expected section.key=value"),
        (MINIMAL, ["data.prompts.x=3"], "prompts is a value, not a section"),
        (MINIMAL | {"channel": {"url": "redis://u:secret@h/0"}}, [], "DRAFTLINE_REDIS_PASSWORD"),
        (MINIMAL | {"store": {"mode": "external"}}, [], "external needs master_address"),
        (MINIMAL | {"run": {"name": "../../etc"}}, [], "run.name"),
        (MINIMAL | {"evaluation": {"prompts": 0, "min_accept_length": 2}}, [], "evaluation.prompts above 0"),
        (MINIMAL | {"archive": {"url": "sftp://u:secret@h/a"}}, [], "archive.url: a password was found"),
        (MINIMAL | {"channel": {"url": "file:/mnt/channel"}}, [], "channel.url: expected redis://"),
        (MINIMAL | {"channel": {"url": "redis://h/0?channel=x"}}, [], "every attempt gets a channel of its own"),
        (MINIMAL | {"store": {"master_address": "h:1"}}, [], "store: expected no addresses with mode: managed"),
        (MINIMAL | {"draft": {"init_from": "./d", "fc_norm": True}}, [], "no sizes beside init_from.*found fc_norm"),
        (MINIMAL, ["target.servers=2"], "target: expected backend: sglang.*found servers"),
        (MINIMAL, ["target.backend=sglang", "target.server_urls=[http://h]", "target.servers=2"], "found server_urls"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, document: object, overrides: list[str], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        load_spec(write(tmp_path, document), overrides)


def test_a_missing_document_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such run document"):
        load_spec(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("name", "states"),
    [
        ("qwen3-8b-eagle3", 4),
        ("llama31-8b-eagle3", 4),
        ("qwen3-8b-eagle3-two-nodes", 4),
        ("qwen3-8b-dflash2", 5),
        ("qwen3-8b-dspark", 6),
    ],
)
def test_the_shipped_documents_can_be_planned_without_weights(name: str, states: int) -> None:
    spec = load_spec(RUNS / f"{name}.yaml")
    facts = read_target_facts(spec.target)
    plan = make_plan(spec, facts, run_id="x", root=Path("x"), total_prompts=1000)
    assert plan.bytes_per_token == 4 + 1 + states * 4096 * 2
    assert plan.total_steps == -(-1000 // spec.global_batch_size)


@pytest.mark.parametrize("layers", [[3, 1], [1, 1], [-1, 2], []])
def test_captured_layers_are_named_in_order(layers: list[int]) -> None:
    with pytest.raises(SpecError, match=r"target\.aux_layers"):
        load_spec(RUNS / "qwen3-8b-eagle3.yaml", [f"target.aux_layers={layers}"])


def test_layers_that_the_target_does_not_have_are_refused() -> None:
    with pytest.raises(TargetError, match=r"from 0 to 34 .*found \[1, 17, 35\]"):
        plan_with(target={"aux_layers": [1, 17, 35]})


def plan_with(**changes: dict[str, object]) -> RunPlan:
    document = load_spec(RUNS / "qwen3-8b-eagle3.yaml").model_dump(mode="json")
    for section, values in changes.items():
        document[section] |= values
    spec = RunSpec.model_validate(document)
    return make_plan(spec, read_target_facts(spec.target), run_id="x", root=Path("x"), total_prompts=100)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"rollout": {"high_watermark_refs": 27}}, r"high_watermark_refs: expected at least .* 28 samples .*found 27"),
        ({"rollout": {"low_watermark_refs": 5}}, r"low_watermark_refs: .*found 5"),
        ({"rollout": {"high_watermark_bytes": "1GiB"}}, "high_watermark_bytes: expected at least"),
        ({"rollout": {"high_watermark_bytes": "65GiB"}}, "at most store.capacity"),
        ({"rollout": {"low_watermark_refs": 600}}, "low watermarks at or below"),
        ({"store": {"capacity": "1GiB"}}, "store.capacity: expected at least"),
        ({"draft": {"vocab_size": 200000}}, "draft.vocab_size: expected at most"),
        ({"data": {"max_tokens": 50000}}, "data.max_tokens: expected at most"),
    ],
)
def test_numbers_that_cannot_work_together_are_refused(changes: dict, complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        plan_with(**changes)
