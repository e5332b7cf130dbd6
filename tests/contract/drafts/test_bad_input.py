"""What cannot work is named for every method, by the checks that come before a process is started or a GPU is held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from disagg_core.checks.preflight import check_run
from disagg_core.drafts.registry import method_names, method_of
from disagg_core.drafts.vocab import VocabMap
from disagg_core.errors import BadInput
from disagg_core.run_spec.document import RunSpec, TargetSection
from disagg_core.run_spec.draft import draft_sections
from disagg_core.settings import CHECKOUT, Settings
from disagg_core.target.facts import TargetFacts, read_target_facts

pytestmark = pytest.mark.unit

TARGET = CHECKOUT / "infra" / "demo" / "target"
SYSTEM, USER = 3, 4
"""Special tokens of the target's tokenizer; only the user's occurs in the prompts here."""
OPTIONS: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "dflash": {"block_size": 9, "num_layers": 2, "mask_token_id": SYSTEM},
    "dflash2": {"block_size": 9, "num_layers": 2, "mask_token_id": SYSTEM, "selector_rank": 4},
    "dspark": {"block_size": 9, "num_layers": 2, "mask_token_id": SYSTEM, "markov_rank": 4},
    "p_eagle": {"num_layers": 2, "depths": 8, "mask_token_id": SYSTEM},
}
MASKED = sorted(set(OPTIONS) - {"eagle3"})
LONGEST = {"dflash": "block_size", "dflash2": "block_size", "dspark": "block_size", "p_eagle": "depths"}


@pytest.fixture(params=sorted(OPTIONS))
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_method_is_in_this_suite() -> None:
    assert set(OPTIONS) == set(method_names())


def check(
    home: Path, method: str, draft: dict[str, Any] | None = None, *, data: dict[str, Any] | None = None, **sections: Any
) -> None:
    options = OPTIONS[method] | (draft or {}) if "init_from" not in (draft or {}) else draft
    document = {
        "target": {"model": str(TARGET), "dtype": "float32", "device": "cpu"},
        "draft": {"method": method, **options},
        "data": {"prompts": str(prompts(home)), "max_tokens": 64, **(data or {})},
        "store": {"capacity": "64MiB"},
        "evaluation": {"prompts": 0},
    }
    for name, section in sections.items():
        document[name] = document[name] | section
    check_run(RunSpec.model_validate(document), Settings(home=home))


def prompts(home: Path, mask: list[int] | None = None) -> Path:
    """Eight tokenized prompts of twelve tokens."""
    file = home / "prompts.jsonl"
    records = [
        {"input_ids": [1, USER, *range(20 + n, 30 + n)], "loss_mask": mask or [0] * 4 + [1] * 8} for n in range(8)
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def published(home: Path, method_name: str, facts: TargetFacts) -> Path:
    """A checkpoint of a draft for a target of these `facts`."""
    method = method_of(method_name)
    section = draft_sections()[method_name].model_validate(OPTIONS[method_name])
    capture = method.capture(section, facts.num_layers, None)
    draft = method.model(method.config_for(section, facts, capture, facts.vocab_size))
    state = dict(draft.serving_state_dict())
    vocab = VocabMap.identity(facts.vocab_size)
    state |= {name: tensor for name, tensor in (("t2d", vocab.t2d), ("d2t", vocab.d2t)) if name in state}
    directory = home / "draft"
    directory.mkdir()
    save_file(state, directory / "draft.safetensors")
    (directory / "config.json").write_text(json.dumps(draft.config.to_dict()))
    return directory


def demo_facts() -> TargetFacts:
    return read_target_facts(TargetSection(model=str(TARGET), dtype="float32", device="cpu"))


def test_what_fits_passes(method: str, tmp_path: Path) -> None:
    check(tmp_path, method)


def test_a_layer_that_the_target_lacks(method: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"target\.aux_layers: expected .*found .*(3|7)"):
        check(tmp_path, method, target={"aux_layers": (0, 1, 3)})
    with pytest.raises(BadInput, match=r"target\.aux_layers: expected .*found .*(3|7)"):
        check(tmp_path, method, target={"aux_layers": (0, 1, 7)})


def test_a_published_draft_of_another_width(method: str, tmp_path: Path) -> None:
    facts = demo_facts()
    other = facts.model_copy(update={"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2})
    path = published(tmp_path, method, other)
    with pytest.raises(BadInput, match=r"draft\.init_from: .*target width: expected 128, found 64"):
        check(tmp_path, method, {"init_from": str(path)})


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_token_outside_the_vocabulary(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"draft\.mask_token_id: expected an id below .* 1024, found 1024"):
        check(tmp_path, name, {"mask_token_id": 1024})


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_token_that_is_text(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"draft\.mask_token_id: .*found 25, which the tokenizer makes of text"):
        check(tmp_path, name, {"mask_token_id": 25})
    with pytest.raises(BadInput, match=rf"draft\.mask_token_id: .*found {USER}, which occurs in data\.prompts"):
        check(tmp_path, name, {"mask_token_id": USER})


@pytest.mark.parametrize("name", MASKED)
def test_more_slots_than_a_sample_has_tokens(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=rf"draft\.{LONGEST[name]}: expected at most .*data\.max_tokens.*, found 30"):
        check(tmp_path, name, {LONGEST[name]: 30}, data={"max_tokens": 16})
    again = {"init_from": str(published(tmp_path, name, demo_facts()))}
    layers = {"aux_layers": (0, 1, 2) if name == "p_eagle" else (0, 2)}
    with pytest.raises(BadInput, match=r"evaluation\.draft_tokens: expected at most the .* at once, found 16"):
        check(tmp_path, name, again, target=layers, evaluation={"prompts": 2, "draft_tokens": 16})
    slots = 9 if name == "dspark" else 8
    with pytest.raises(BadInput, match=rf"data\.max_tokens: expected more than the {slots} tokens .*found 8"):
        check(tmp_path, name, again, target=layers, data={"max_tokens": 8})


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        ([0, 1] * 6, ("dflash", "dflash2", "dspark")),
        ([1, 1] + [0] * 10, ("eagle3", "p_eagle")),
    ],
    ids=["no two neighbours", "nothing after the second token"],
)
def test_prompts_without_anything_to_train_on(mask: list[int], names: tuple[str, ...], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in names:
        with pytest.raises(
            BadInput, match=r"none of the first 8 prompts can be trained on; .*(neighbouring|no position)"
        ):
            check(tmp_path, name, data={"prompts": str(prompts(other, mask))})


@pytest.mark.parametrize("name", ["dflash", "dflash2", "dspark"])
def test_continuations_without_two_neighbours(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"data\.generate\.max_new_tokens: 1 are too few to train on: no two neighbour"):
        check(tmp_path, name, data={"generate": {"max_new_tokens": 1}})


def test_a_dflash_draft_goes_on_as_dflash2_and_as_nothing_else(tmp_path: Path) -> None:
    path = published(tmp_path, "dflash", demo_facts())
    check(tmp_path, "dflash2", {"init_from": str(path)}, target={"aux_layers": (0, 2)})
    for name in ("eagle3", "dspark", "p_eagle"):
        with pytest.raises(BadInput, match=rf"draft\.init_from: .*expected a draft of method {name}, found dflash"):
            check(tmp_path, name, {"init_from": str(path)})
