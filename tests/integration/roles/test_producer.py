"""The producer's role over a real target, store and channel: what it publishes, and what it leaves behind."""

from __future__ import annotations

import json

import pytest
import torch

from disagg_core.channel import StreamingRefChannel
from disagg_core.contracts import ordinal_of
from disagg_core.drafts.vocab import VocabMap
from disagg_core.engines import transformers as transformers_module
from disagg_core.engines.generation import continue_tasks
from disagg_core.errors import BadInput, ChannelClosed
from disagg_core.roles.producer import run_producer
from disagg_core.rollout.heldout import FIRST_ORDINAL
from disagg_core.run.heldout import HeldOutFiles
from disagg_core.run.metrics import read_metrics
from disagg_core.run.outcomes import read_outcome
from disagg_core.run.progress import read_progress
from disagg_core.store import MooncakeFeatureStore
from tests.integration.rollout.rollout_kit import read_all, tensors_of

pytestmark = pytest.mark.integration


@pytest.fixture
def swept(endpoints):
    """Sweep the namespaces that a test has filled."""
    assignments = []
    yield assignments.append
    for assignment in assignments:
        with MooncakeFeatureStore(assignment.store, namespace=assignment.namespace) as store:
            store.sweep()


def test_a_producer_publishes_every_prompt_in_order_and_ends_the_stream(make_assignment, swept):
    assignment = make_assignment(8)
    swept(assignment)

    totals = run_producer(assignment)

    refs, read = read_all(assignment)
    assert [ordinal_of(ref.sample_id) for ref in refs] == list(range(8))
    assert read == totals
    assert (totals.refs, totals.prompts, totals.rejected) == (8, 8, 0)
    state = assignment.dir.state
    assert read_outcome(state / "producer-outcome.json").result["refs"] == 8
    assert read_progress(state / "producer.json")["phase"] == "ended"
    assert list(read_metrics(assignment.plan.dir.metrics / "rollout.jsonl"))[-1]["published"] == 8
    plan = assignment.plan
    for ref in refs:
        assert ref.vocab_map_version == VocabMap.load(plan.dir.vocab_map).version
        assert (ref.target_model_version, ref.tokenizer_version) == (plan.target.version, plan.tokenizer_version)
        assert {name: spec.dtype for name, spec in ref.feature_specs.items()} == {
            "input_ids": "int32",
            "loss_mask": "uint8",
            "aux_hidden_states": "float32",
            "last_hidden_state": "float32",
        }


def test_what_is_stored_is_what_the_target_computes(make_assignment, swept):
    from transformers import AutoModelForCausalLM

    assignment = make_assignment(12)
    swept(assignment)
    run_producer(assignment)

    refs, _ = read_all(assignment)
    model = AutoModelForCausalLM.from_pretrained(assignment.plan.spec.target.model)
    layers = assignment.plan.capture.layers
    for ref, sample in zip(refs, tensors_of(assignment, refs), strict=True):
        with torch.no_grad():
            plain = model(sample["input_ids"].long()[None], output_hidden_states=True)
        aux = torch.cat([plain.hidden_states[layer + 1][0] for layer in layers], -1)
        torch.testing.assert_close(sample["aux_hidden_states"], aux, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sample["last_hidden_state"], plain.hidden_states[-1][0], atol=1e-5, rtol=1e-5)
        assert ref.num_tokens == len(sample["input_ids"]) == len(sample["loss_mask"])
        assert sample["loss_mask"].any()


@pytest.mark.parametrize("generate", [None, {"max_new_tokens": 8}])
def test_held_out_samples_are_captured_once_beside_the_stream(make_assignment, swept, generate):
    training = {"heldout": {"prompts": 5}}
    sections = {"data": {"generate": generate}, "training": training, "evaluation": {"prompts": 2}}
    assignment = make_assignment(40, **sections)
    swept(assignment)
    run_producer(assignment)

    refs, _ = read_all(assignment)
    plan = assignment.plan
    files = HeldOutFiles(plan.dir.heldout, plan.identity(1, ""))
    assert files.count == 5
    held_out = [files.read(number) for number in range(5)]
    streamed = {tuple(sample["input_ids"].tolist()) for sample in tensors_of(assignment, refs)}
    assert [ordinal_of(ref.sample_id) for ref in refs] == list(range(33))
    for sample_id, sample in held_out:
        assert ordinal_of(sample_id) >= FIRST_ORDINAL
        assert sample.keys() == {"input_ids", "loss_mask", "aux_hidden_states", "last_hidden_state"}
        assert tuple(sample["input_ids"].tolist()) not in streamed
    with MooncakeFeatureStore(assignment.store, namespace=assignment.namespace) as store:
        assert store.key_count() == len(refs)

    written = (plan.dir.heldout / "manifest.json").stat().st_mtime_ns
    again = make_assignment(40, attempt=2, **sections)
    swept(again)
    run_producer(again)
    assert (plan.dir.heldout / "manifest.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("generate", [None, {"max_new_tokens": 8}, {"max_new_tokens": 8, "temperature": 0.9}])
def test_a_resumed_run_publishes_the_same_bits_wherever_it_was_interrupted(make_assignment, swept, generate):
    sections = {"data": {"generate": generate}, "rollout": {"batch_tokens": 1024, "high_watermark_refs": 64}}
    whole = make_assignment(30, **sections)
    swept(whole)
    run_producer(whole)
    refs, _ = read_all(whole)
    expected = dict(zip([ref.sample_id for ref in refs], tensors_of(whole, refs), strict=True))

    for attempt, covered in ((2, [[0, 4]]), (3, [[0, 10], [13, 13]])):
        resumed = make_assignment(30, attempt=attempt, **sections)
        swept(resumed)
        resumed.dir.state.mkdir(parents=True)
        (resumed.dir.state / "skip.json").write_text(json.dumps(covered))
        run_producer(resumed)

        again, totals = read_all(resumed)
        left = [n for n in range(30) if not any(a <= n <= b for a, b in covered)]
        assert [ordinal_of(ref.sample_id) for ref in again] == left
        assert totals.prompts == len(left)
        for ref, sample in zip(again, tensors_of(resumed, again), strict=True):
            for name, tensor in sample.items():
                assert torch.equal(tensor, expected[ref.sample_id][name]), (ref.sample_id, name)


def test_a_restarted_producer_goes_on_after_the_last_published_sample(make_assignment, swept):
    assignment = make_assignment(20)
    swept(assignment)
    interrupted = make_assignment(20, data={"limit": 20})
    run_producer(interrupted)
    refs, _ = read_all(interrupted)
    log = assignment.dir.channel
    # given: a stream whose writer died after the seventh sample, and one more that it had stored
    import shutil

    shutil.rmtree(log)
    with StreamingRefChannel(assignment.channel_url, run_id=assignment.plan.run_id) as channel:
        channel.publish_many(refs[:7])
    with MooncakeFeatureStore(assignment.store, namespace=assignment.namespace) as store:
        for ref in refs[8:]:
            store.abort(ref)
        assert store.key_count() == 8

    totals = run_producer(assignment)

    again, _ = read_all(assignment)
    assert [ordinal_of(ref.sample_id) for ref in again] == list(range(20))
    assert (totals.refs, totals.prompts) == (20, 20)
    with MooncakeFeatureStore(assignment.store, namespace=assignment.namespace) as store:
        assert store.key_count() == 20


def test_rejected_prompts_are_listed_and_counted(make_assignment, swept, tmp_path):
    good = {"prompt": "what?", "response": "that."}
    late = {"input_ids": [5] * 40, "loss_mask": [1] * 40}
    empty = {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 0, 0]}
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, [good, late, empty, good])))
    assignment = make_assignment(data={"max_tokens": 32, "truncation": "reject"})
    swept(assignment)

    totals = run_producer(assignment)

    assert (totals.prompts, totals.refs, totals.rejected) == (4, 2, 2)
    lines = [json.loads(line) for line in (assignment.dir.state / "rejected.jsonl").read_text().splitlines()]
    assert {line["source"] for line in lines} == {"prompts.jsonl:2", "prompts.jsonl:3"}
    assert all(line["kind"] == "rejected" and line["reason"] for line in lines)


def test_a_run_in_which_nothing_can_be_used_fails_by_name(make_assignment, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "what?", "response": "that."}))
    assignment = make_assignment()
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"input_ids": [5, 6, 7], "loss_mask": [0, 0, 0]}))

    with pytest.raises(BadInput, match="all 1 prompts were rejected"):
        run_producer(assignment)

    outcome = read_outcome(assignment.dir.state / "producer-outcome.json")
    assert (outcome.state, outcome.failure_class) == ("failed", "bad_input")
    with (
        StreamingRefChannel(assignment.channel_url, run_id=assignment.plan.run_id) as channel,
        pytest.raises(ChannelClosed),
    ):
        channel.fail("again")


def test_the_draft_vocabulary_is_counted_from_what_the_target_says(make_assignment, swept):
    assignment = make_assignment(
        24, draft={"vocab_size": 40, "vocab_sample": 6}, data={"generate": {"max_new_tokens": 6}}
    )
    swept(assignment)
    run_producer(assignment)

    vocab_map = VocabMap.load(assignment.plan.dir.vocab_map)
    assert int(vocab_map.t2d.sum()) == 40
    refs, _ = read_all(assignment)
    first = tensors_of(assignment, refs[:1])[0]
    said = first["input_ids"][first["loss_mask"].bool()].long()
    assert vocab_map.t2d[said].all()


@pytest.mark.parametrize("epochs", [1, 2])
def test_what_was_counted_is_captured_and_no_prompt_is_continued_twice(make_assignment, swept, monkeypatch, epochs):
    continued = []

    def counting(model, tasks, *arguments, **options):
        continued.extend(task.ordinal for task in tasks)
        return continue_tasks(model, tasks, *arguments, **options)

    monkeypatch.setattr(transformers_module, "continue_tasks", counting)
    draft = {"vocab_size": 40, "vocab_sample": 6}
    data = {"generate": {"max_new_tokens": 6}, "epochs": epochs}
    for attempt in (1, 2):  # of the second one the producer is a new process, and finds what was said
        assignment = make_assignment(24, attempt=attempt, draft=draft, data=data)
        swept(assignment)
        run_producer(assignment)
        refs, totals = read_all(assignment)
        assert totals.refs == len(refs) == 24 * epochs
        assert sorted(continued) == list(range(24))
