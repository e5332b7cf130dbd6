"""`draftline regenerate`: a data set of the target's own continuations, written once, resumable, trainable."""

from __future__ import annotations

import json

import pytest
import yaml
from typer import Typer
from typer.testing import CliRunner

from disagg_core.cli.rollout import regenerate as command
from disagg_core.engines.registry import target_of
from disagg_core.errors import BadInput
from disagg_core.roles.producer import run_producer
from disagg_core.rollout.regenerate import regenerate
from disagg_core.store import MooncakeFeatureStore
from tests.integration.rollout.rollout_kit import read_all, tensors_of

pytestmark = pytest.mark.integration

GENERATE = {"data": {"generate": {"max_new_tokens": 6}}, "rollout": {"batch_tokens": 1024}}


@pytest.fixture
def run(make_assignment, tmp_path):
    """Regenerate into a file of the given name, with a fresh target each time."""

    def run(name, **sections):
        plan = make_assignment(20, **{**GENERATE, **sections}).plan
        target = target_of(plan.spec, plan.target, plan.capture, store=None, log_dir=tmp_path)
        try:
            return regenerate(plan.spec, plan.target, target, tmp_path / name)
        finally:
            target.close()

    return run


def test_every_prompt_is_continued_once_and_interruptions_change_nothing(run, tmp_path):
    assert run("whole.jsonl").written == 20
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [line["ordinal"] for line in lines] == list(range(20))
    for line in lines:
        assert 1 <= sum(line["loss_mask"]) <= 6
        assert line["loss_mask"] == sorted(line["loss_mask"]), "the continuation is at the end"

    for cut in (0, len(whole) // 3, len(whole) - 5):
        (tmp_path / "again.jsonl").write_bytes(whole[:cut])
        (tmp_path / "again.jsonl.meta.json").write_bytes((tmp_path / "whole.jsonl.meta.json").read_bytes())
        done = run("again.jsonl")
        assert done.before + done.written == 20
        assert (tmp_path / "again.jsonl").read_bytes() == whole


def test_another_sampling_does_not_go_into_the_same_file(run):
    run("out.jsonl")
    with pytest.raises(BadInput, match="another generate"):
        run("out.jsonl", data={"generate": {"max_new_tokens": 5}})
    with pytest.raises(BadInput, match=r"another evaluation\.prompts"):
        run("out.jsonl", evaluation={"prompts": 3})


def test_without_a_generate_section_it_says_what_is_missing(run):
    with pytest.raises(BadInput, match=r"data\.generate"):
        run("out.jsonl", data={})


def test_the_file_is_what_a_run_with_generation_would_capture(run, make_assignment, tmp_path):
    run("out.jsonl")
    live = make_assignment(20, **GENERATE)
    again = make_assignment(attempt=2, data={"prompts": str(tmp_path / "out.jsonl"), "shuffle": False})
    samples = []
    for assignment in (live, again):
        run_producer(assignment)
        refs, _ = read_all(assignment)
        samples.append([(t["input_ids"].tolist(), t["loss_mask"].tolist()) for t in tensors_of(assignment, refs)])
        with MooncakeFeatureStore(assignment.store, namespace=assignment.namespace) as store:
            store.sweep()
    assert samples[0] == samples[1]


def test_the_command_writes_the_file(make_assignment, tmp_path):
    spec = make_assignment(6, **GENERATE).plan.spec
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_unset=True)))
    app = Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(tmp_path / "spec.yaml"), "--out", str(tmp_path / "o.jsonl")])
    assert result.exit_code == 0, result.output
    assert len((tmp_path / "o.jsonl").read_text().splitlines()) == 6
