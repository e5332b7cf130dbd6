"""Two drafts from one rollout, from prompts to figures: the real producer, consumer and evaluation of one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from disagg_core.cli import drafts as commands
from disagg_core.contracts import Capture
from disagg_core.drafts.export import import_draft
from disagg_core.drafts.vocab import VocabMap
from disagg_core.errors import BadInput
from disagg_core.roles.consumer import run_consumer
from disagg_core.roles.evaluation import EvaluationRequest, evaluate_drafts
from disagg_core.roles.producer import run_producer
from disagg_core.run.metrics import read_metrics
from disagg_core.run.plan import RoleAssignment
from disagg_core.store import MooncakeFeatureStore
from disagg_core.training.checkpoint import covered_ordinals, newest_complete, read_state
from tasks.roles import hand_over_cursor
from tests.integration.forks import end, forked
from tests.kit.waiting import eventually

pytestmark = pytest.mark.integration

PROMPTS = 60
TRAINING = {"batch_size": 2, "save_every_steps": 2, "learning_rate": 1e-2, "cpu_threads": 1, "device": "cpu"}
FLASH = {"method": "dflash", "name": "flash", "block_size": 4, "num_layers": 1, "mask_token_id": 0, "anchors": 6}
DRAFTS = [{"method": "eagle3", "vocab_size": 40, "ttt_length": 2}, FLASH]


@pytest.fixture
def assignment(make_assignment, tmp_path):
    """Make an attempt's assignment of a run of `drafts`; every namespace is swept at the end."""
    made: list[RoleAssignment] = []

    def make(drafts=DRAFTS, attempt: int = 1, home: str = "run") -> RoleAssignment:
        plain = make_assignment(PROMPTS, attempt, training=TRAINING)
        document = plain.plan.spec.model_dump(mode="json") | {"draft": None, "drafts": list(drafts)}
        spec = type(plain.plan.spec).model_validate(document)
        capture = captured(drafts)
        root = tmp_path / home
        changes = {"spec": spec, "capture": capture, "root": root, "run_id": f"{plain.plan.run_id}-{home}"}
        found = plain.model_copy(update={"plan": plain.plan.model_copy(update=changes)})
        for folder in (found.dir.state, found.dir.logs):
            folder.mkdir(parents=True, exist_ok=True)
        (found.dir.state / "rejected.jsonl").touch()
        made.append(found)
        return found

    yield make
    for found in made:
        with MooncakeFeatureStore(found.store, namespace=found.namespace) as store:
            store.sweep()


def captured(drafts) -> Capture:
    """Of the four layers of the target: EAGLE-3 reads three and the last state, this DFlash one in the middle."""
    return Capture((0, 1, 2) if "eagle3" in str(drafts) else (2,), last_hidden_state="eagle3" in str(drafts))


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "draft.safetensors")


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(weight, right[name]) for name, weight in left.items())


def killed_at(step: int, assignment: RoleAssignment) -> None:
    """Run the consumer as a process and kill it as soon as each draft has taken `step` steps."""
    document = assignment.dir.state / "consumer-assignment.json"
    document.write_text(assignment.model_dump_json())
    log = assignment.dir.logs / "consumer.log"
    child = forked("disagg_core.roles.consumer", [str(document)], log)
    files = [draft.dir.train_metrics for draft in assignment.plan.drafts]
    try:
        eventually(
            lambda: all(any(record["step"] >= step for record in read_metrics(file)) for file in files),
            lambda: log.read_text()[-4000:],
            every_s=0.01,
            alive=child.is_alive,
        )
    finally:
        end(child)


@pytest.mark.slow
def test_a_killed_run_of_two_drafts_ends_with_the_bits_that_each_has_alone(assignment, tmp_path):
    first = assignment()
    plan = first.plan
    run_producer(first)
    killed_at(3, first)
    newest = newest_complete(plan.dir.checkpoints)
    assert newest is not None
    assert 4 <= len(covered_ordinals(plan.dir.checkpoints)) < PROMPTS
    assert set(read_state(newest).drafts) == {"eagle3", "flash"}

    second = assignment(attempt=2)
    hand_over_cursor(second)
    totals = run_producer(second)
    outcome = run_consumer(second)

    assert totals.refs == PROMPTS - len(covered_ordinals(newest.parent)) + outcome.samples_here
    assert (outcome.steps, outcome.samples, outcome.quarantined) == (PROMPTS // 2, PROMPTS, 0)
    last = newest_complete(plan.dir.checkpoints)
    for draft in plan.drafts:
        alone = assignment([draft.section.model_dump(mode="json")], home=f"alone-{draft.name}")
        run_producer(alone)
        run_consumer(alone)
        (only,) = alone.plan.drafts
        expected = only.checkpoint_in(newest_complete(alone.plan.dir.checkpoints))
        assert same(weights_in(draft.checkpoint_in(last)), weights_in(expected)), draft.name
        vocabularies = [VocabMap.load(place.dir.vocab_map).version for place in (draft, only)]
        assert vocabularies[0] == vocabularies[1]


def test_the_drafts_of_a_run_are_measured_and_exported_each_by_its_name(assignment, tmp_path, monkeypatch, capsys):
    found = assignment()
    plan = found.plan
    run_producer(found)
    run_consumer(found)
    section = plan.spec.evaluation.model_copy(update={"prompts": 3, "max_new_tokens": 8, "draft_tokens": 3})
    plan = plan.model_copy(update={"spec": plan.spec.model_copy(update={"evaluation": section})})
    plan.dir.evaluation.mkdir()
    prompts = [json.dumps({"input_ids": [5 + n, 9, 30 + n, 7]}) for n in range(3)]
    (plan.dir.evaluation / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    last = newest_complete(plan.dir.checkpoints)
    checkpoints = tuple((draft.result_name("after"), draft.checkpoint_in(last)) for draft in plan.drafts)

    results = evaluate_drafts(EvaluationRequest(plan=plan, checkpoints=checkpoints))

    assert [result["lossless"] for result in results] == [True, True]
    assert all(1 <= result["accept_length"] <= 4 for result in results)
    assert json.loads((plan.dir.evaluation / "flash-after.json").read_text())["draft_tokens"] == 3
    monkeypatch.setattr(commands, "find_run", lambda *_: plan.dir)
    monkeypatch.setattr(commands, "read_plan", lambda _: plan)
    with pytest.raises(BadInput, match=r"the name of one of its drafts \(eagle3, flash\)"):
        commands.export("run", tmp_path / "served")
    commands.export("run", tmp_path / "served", draft="flash", dtype="float32")
    method, _, state = import_draft(tmp_path / "served")
    assert method.name == "dflash"
    assert same(state, weights_in(last / "flash"))
    commands.evaluate("run", draft="eagle3", name="again")
    again = json.loads((plan.dir.evaluation / "again.json").read_text())
    assert again["accept_length"] == results[0]["accept_length"]
