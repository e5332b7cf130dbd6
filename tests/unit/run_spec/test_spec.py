"""The run document: what is wrong is said at once, with the place and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from disagg_core.errors import BadInput, SpecError, TargetError
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


def test_a_model_that_is_a_directory_is_made_absolute_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "documents" / "models" / "beside").mkdir(parents=True)
    (tmp_path / "elsewhere" / "here").mkdir(parents=True)
    document = tmp_path / "documents" / "run.yaml"
    monkeypatch.chdir(tmp_path / "elsewhere")

    def model(name: str) -> str:
        document.write_text(yaml.safe_dump({"target": {"model": name}, "data": {"prompts": "p.jsonl"}}))
        return load_spec(document).target.model

    assert model("models/beside") == str(tmp_path / "documents" / "models" / "beside")
    assert model("here") == str(tmp_path / "elsewhere" / "here")
    assert model("./here") == str(tmp_path / "documents" / "here")
    assert model("org/model") == "org/model"


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
        (MINIMAL | {"training": {"packing": False, "pack_tokens": 9}}, [], "expected packed micro-batches"),
        (MINIMAL | {"training": {"optimizer": "sgd"}}, [], "training.optimizer: .*found 'sgd'"),
        (MINIMAL | {"training": {"optimizer_offload": True, "device": "cpu"}}, [], "expected device: cuda or auto"),
        ({"data": {"prompts": "p"}}, [], "target: missing"),
        ([1, 2], [], "expected sections"),
        ("run: [", [], "not valid YAML"),
        (MINIMAL, ["max_steps=3"], "expected section.key=value"),
        (MINIMAL, ["data.prompts.x=3"], "prompts is a value, not a section"),
        (MINIMAL | {"channel": {"url": "redis://u:secret@h/0"}}, [], "DRAFTLINE_REDIS_PASSWORD"),
        (MINIMAL | {"store": {"mode": "external"}}, [], "external needs master_address"),
        (MINIMAL | {"training": {"early_stop": {"patience": 3}}}, [], "early_stop takes effect with training.heldout"),
        (MINIMAL | {"run": {"name": "../../etc"}}, [], "run.name"),
        (MINIMAL | {"evaluation": {"prompts": 0, "min_accept_length": 2}}, [], "evaluation.prompts above 0"),
        (MINIMAL | {"archive": {"url": "sftp://u:secret@h/a"}}, [], "archive.url: a password was found"),
        (MINIMAL | {"channel": {"url": "file:/mnt/channel"}}, [], "channel.url: expected redis://"),
        (MINIMAL | {"channel": {"url": "redis://h/0?channel=x"}}, [], "every attempt gets a channel of its own"),
        (MINIMAL | {"store": {"master_address": "h:1"}}, [], "store: expected no addresses with mode: managed"),
        (MINIMAL | {"draft": {"init_from": "./d", "fc_norm": True}}, [], "no sizes beside init_from.*found fc_norm"),
        (MINIMAL | {"draft": {}, "drafts": [{}, {}]}, [], "expected draft, or drafts for several, found both"),
        (MINIMAL | {"drafts": [{}, {}]}, [], "expected a name for each draft, found eagle3 more than once"),
        (MINIMAL | {"drafts": [{}, {"method": "dflash", "name": "a/b"}]}, [], r"drafts\.1\.name: .*found 'a/b'"),
        (
            MINIMAL | {"drafts": [{}, {"method": "dflash", "block": 8}]},
            [],
            r"drafts\.1\.block: .*did you mean block_size",
        ),
        (MINIMAL | {"drafts": [{}, {"method": "dflash"}]}, ["drafts.dspark.anchors=8"], "one of eagle3, dflash, found"),
        (MINIMAL | {"drafts": [{}, {"method": "dflash"}]}, ["drafts.dflash=8"], r"expected drafts\.<name>\.key=value"),
        (MINIMAL | {"drafts": {"method": "dflash"}}, [], "drafts: Input should be a valid tuple"),
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


SEVERAL = [
    {"method": "eagle3"},
    {"method": "dflash", "mask_token_id": 3, "block_size": 8, "num_layers": 2},
    {"method": "dflash", "name": "early", "aux_layers": [0, 1], "mask_token_id": 3, "block_size": 8, "num_layers": 2},
]


def demo_with(drafts: list[dict[str, object]], *overrides: str) -> RunPlan:
    document = yaml.safe_load((RUNS / "demo.yaml").read_text())
    del document["draft"]
    for section, key in (("target", "model"), ("data", "prompts"), ("data", "holdout")):
        document[section][key] = str((RUNS / document[section][key]).resolve())
    spec = RunSpec.model_validate(document | {"drafts": drafts})
    return make_plan(spec, read_target_facts(spec.target), run_id="x", root=Path("x"), total_prompts=2400)


def test_a_list_of_one_draft_is_that_draft() -> None:
    alone = {"method": "dflash", "block_size": 8}
    assert RunSpec.model_validate(MINIMAL | {"drafts": [alone]}) == RunSpec.model_validate(MINIMAL | {"draft": alone})
    assert RunSpec.model_validate(MINIMAL) == RunSpec.model_validate(MINIMAL | {"drafts": [{"method": "eagle3"}]})


def test_several_drafts_have_names_and_come_back_as_they_were(tmp_path: Path) -> None:
    document = MINIMAL | {"drafts": [{}, {"method": "dflash", "init_from": "./old/export", "learning_rate": 2e-3}]}
    spec = load_spec(write(tmp_path, document), ["drafts.eagle3.ttt_length=3"])

    assert [draft.label for draft in spec.all_drafts] == ["eagle3", "dflash"]
    assert spec.all_drafts[0].model_dump()["ttt_length"] == 3
    assert spec.all_drafts[1].init_from == str(tmp_path / "old/export")
    assert RunSpec.model_validate(spec.model_dump(mode="json")) == spec


def test_what_is_captured_is_what_any_draft_reads() -> None:
    plan = demo_with(SEVERAL)

    assert [draft.capture.layers for draft in plan.drafts] == [(0, 1, 2), (0, 2), (0, 1)]
    assert plan.capture.layers == (0, 1, 2)
    assert plan.capture.last_hidden_state
    assert [draft.capture.last_hidden_state for draft in plan.drafts] == [True, False, False]
    assert plan.bytes_per_token == 4 + 1 + 4 * 128 * 4
    assert plan.identity(1, "v").strategy == "eagle3+dflash+early:dflash"


def test_the_files_of_several_drafts_lie_in_folders_of_their_names() -> None:
    one, several = demo_with(SEVERAL[:1]), demo_with(SEVERAL)

    (alone,) = one.drafts
    assert (alone.dir.vocab_map, alone.dir.export) == (one.dir.vocab_map, one.dir.export)
    assert alone.checkpoint_in(one.dir.checkpoints / "step-3") == one.dir.checkpoints / "step-3"
    assert alone.result_name("after") == "after"
    early = several.draft("early")
    assert early.dir.export == several.root / "drafts" / "early" / "export"
    assert early.checkpoint_in(several.dir.checkpoints / "step-3") == several.dir.checkpoints / "step-3" / "early"
    assert early.result_name("after") == "early-after"
    with pytest.raises(BadInput, match=r"one of its drafts \(eagle3, dflash, early\), found None"):
        several.draft(None)


def test_every_draft_that_does_not_fit_the_target_is_named() -> None:
    small = {"mask_token_id": 3, "block_size": 4}
    with pytest.raises(BadInput) as complaint:
        demo_with([{}, {"method": "dflash", **small}, {"method": "dspark", **small}])
    assert "dflash: evaluation.draft_tokens: expected at most draft.block_size - 1 (3), found 5" in str(complaint.value)
    assert "dspark: evaluation.draft_tokens: expected at most draft.block_size (4), found 5" in str(complaint.value)
