"""What is checked and fixed before a run: the machine, the target's revision, the run's directory."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from disagg_core.checks.preflight import _pinned, check_channel, check_run, prepare_run
from disagg_core.errors import BadInput, TargetError
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import Settings
from disagg_core.target.facts import read_target_facts
from tests.ports import free_port

pytestmark = pytest.mark.unit

DEMO = Path(__file__).resolve().parents[3] / "infra" / "runs" / "demo.yaml"

TARGET = DEMO.parent.parent / "demo" / "target"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


def a_spec(*overrides: str) -> RunSpec:
    return load_spec(DEMO, ["data.limit=40", *overrides])


def test_a_prepared_run_has_its_document_and_its_held_out_prompts(settings: Settings) -> None:
    plan = prepare_run(a_spec(), "demo-1", settings)
    assert (plan.total_prompts, plan.total_steps) == (40, 5)
    assert plan.dir.document.is_file()
    lines = (plan.dir.evaluation / "prompts.jsonl").read_bytes().splitlines()
    assert len(lines) == 16
    assert all(msgspec.json.decode(line)["input_ids"] for line in lines)
    assert prepare_run(a_spec(), "demo-1", settings) == plan


def test_another_spec_does_not_take_over_a_run(settings: Settings) -> None:
    prepare_run(a_spec(), "demo-1", settings)
    with pytest.raises(BadInput, match="demo-1 exists with another spec"):
        prepare_run(a_spec("training.batch_size=4"), "demo-1", settings)


def test_checking_writes_nothing(settings: Settings, tmp_path: Path) -> None:
    check_run(a_spec(), settings)
    assert list(tmp_path.iterdir()) == []


def test_a_channel_whose_server_is_not_there_is_refused(settings: Settings) -> None:
    check_channel(a_spec(), settings)
    with pytest.raises(BadInput, match=r"channel.url: redis://127.0.0.1:\d+/0 cannot be used"):
        check_channel(a_spec(f"channel.url=redis://127.0.0.1:{free_port()}/0"), settings)
    with pytest.raises(BadInput, match="no valid host and port"):
        check_run(a_spec("channel.url=redis://127.0.0.1:port/0"), settings)


def test_a_target_without_weights_is_named(settings: Settings, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in TARGET.iterdir():
        if path.suffix != ".safetensors":
            (bare / path.name).write_bytes(path.read_bytes())
    with pytest.raises(TargetError, match=r"bare holds no \*.safetensors weights"):
        check_run(a_spec(f"target.model={bare}"), settings)


def test_a_hub_model_is_pinned_to_the_commit_of_now() -> None:
    spec = a_spec()
    facts = read_target_facts(spec.target)
    assert _pinned(spec, facts) == spec
    assert _pinned(spec, facts.model_copy(update={"commit": "abc"})).target.revision == "abc"
