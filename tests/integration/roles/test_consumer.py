"""The consumer's process: it waits for its vocabulary map, survives its own death, and says how it ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from disagg_core.drafts.vocab import VocabMap
from disagg_core.errors import ChannelStalled, IncompatibleDraft, Preempted, ProducerFailed
from disagg_core.processes.stop_signal import StopSignal
from disagg_core.roles.consumer import run_consumer
from disagg_core.run.metrics import read_metrics
from disagg_core.run.outcomes import PREEMPTED_EXIT_CODE, read_outcome
from disagg_core.run.plan import RoleAssignment, make_plan
from disagg_core.run.progress import read_progress
from disagg_core.run_spec.document import RunSpec
from disagg_core.target.facts import read_target_facts
from disagg_core.training.checkpoint import covered_ordinals, newest_complete, read_state
from tests.integration.channel.away import leaving_redis
from tests.integration.forks import end, forked
from tests.integration.training.consumer_kit import Attempt
from tests.kit.waiting import eventually

pytestmark = pytest.mark.integration

SAMPLES = 38
WINDOW = 4
ROLE = ("disagg_core.roles.consumer", "tests.integration.roles.killed_settling")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory) -> Path:
    """A tiny Llama as wide as the kit's samples."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("target")
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


class Run:
    """A run's directory with the producer's side played by the test."""

    def __init__(self, root: Path, target_dir: Path, endpoints, **sections) -> None:
        document = {
            "target": {"model": str(target_dir), "dtype": "float32", "device": "cpu"},
            "draft": {"vocab_size": 32, "ttt_length": 3},
            "data": {"prompts": "unused.jsonl", "max_tokens": 32},
            "training": {"batch_size": WINDOW, "save_every_steps": 2, "learning_rate": 1e-2, "cpu_threads": 1},
            "store": {"capacity": 64 << 20},
        }
        for name, section in sections.items():
            document[name] = {**document.get(name, {}), **section}
        spec = RunSpec.model_validate(document)
        facts = read_target_facts(spec.target)
        self.plan = make_plan(spec, facts, run_id=root.name, root=root, total_prompts=SAMPLES)
        self.vocab_map = VocabMap.from_counts(torch.arange(64) % 7, 32)
        self._endpoints = endpoints

    def assignment(self, attempt: int) -> RoleAssignment:
        return RoleAssignment(plan=self.plan, attempt=attempt, store=self._endpoints)

    def attempt(self, number: int) -> Attempt:
        opened = Attempt(self._endpoints, self.plan.root, self.plan.run_id, number)
        opened.identity = self.plan.identity(number, self.vocab_map.version)
        return opened

    def start(self, attempt: int, *killed: object) -> ForkServerProcess:
        """Start the role as its own process; `killed`: when it is to be, as `killed_settling` takes it."""
        return forked(ROLE[bool(killed)], [str(self._document(attempt)), *map(str, killed)], self._log(attempt))

    def start_ranks(self, attempt: int, *killed: object) -> subprocess.Popen:
        """Start two ranks of the role under torchrun; `killed` as for `start`."""
        arguments = [str(self._document(attempt)), *map(str, killed)]
        command = [sys.executable, *TORCHRUN, "-m", ROLE[bool(killed)], *arguments]
        with self._log(attempt).open("wb") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    def _document(self, attempt: int) -> Path:
        assignment = self.assignment(attempt)
        document = assignment.dir.state / "consumer-assignment.json"
        document.parent.mkdir(parents=True, exist_ok=True)
        document.write_text(assignment.model_dump_json())
        return document

    def _log(self, attempt: int) -> Path:
        return self.assignment(attempt).dir.state / "consumer.log"

    def wait_for_step(self, alive: Callable[[], bool], attempt: int, step: int) -> None:
        metrics, log = self.plan.dir.metrics / "train.jsonl", self._log(attempt)
        eventually(
            lambda: any(record["step"] == step for record in read_metrics(metrics)),
            lambda: log.read_text()[-4000:],
            alive=alive,
        )


def uncovered(run: Run, stop: int = SAMPLES) -> Iterable[int]:
    """What a producer would publish: everything that the newest checkpoint does not cover."""
    covered = covered_ordinals(run.plan.dir.checkpoints)
    return [ordinal for ordinal in range(stop) if ordinal not in covered]


@pytest.fixture(scope="module")
def calm(tmp_path_factory, target_dir, endpoints) -> Path:
    """The last checkpoint of a run that nothing happened to."""
    run = Run(tmp_path_factory.mktemp("calm"), target_dir, endpoints)
    run.vocab_map.save(run.plan.dir.vocab_map)
    with run.attempt(1) as attempt:
        attempt.publish(range(SAMPLES))
        outcome = run_consumer(run.assignment(1))
    assert (outcome.steps, outcome.samples, outcome.reason) == (10, SAMPLES, "end of stream")
    return newest_complete(run.plan.dir.checkpoints)


def test_a_run_that_was_killed_and_preempted_ends_with_the_same_bits(tmp_path, target_dir, endpoints, calm):
    run = Run(tmp_path / "storm", target_dir, endpoints)
    with run.attempt(1) as attempt:
        child = run.start(1)
        try:
            run.vocab_map.save(run.plan.dir.vocab_map)
            attempt.publish(range(5 * WINDOW), ended=False)
            run.wait_for_step(child.is_alive, 1, 5)
            saved = run.plan.dir.checkpoints / "step-4"
            eventually(lambda: newest_complete(saved.parent) == saved, f"{saved}, which is saved beside step 5")
        finally:
            end(child)
        assert read_outcome(run.assignment(1).dir.state / "consumer-outcome.json") is None
    state = read_state(newest_complete(run.plan.dir.checkpoints))
    assert (state.step, state.cursor.trained) == (4, [(0, 15)])

    with run.attempt(2) as attempt:
        attempt.publish(uncovered(run, stop=7 * WINDOW), ended=False)
        child = run.start(2)
        try:
            run.wait_for_step(child.is_alive, 2, 7)
            for _ in range(2):
                os.kill(child.pid, signal.SIGTERM)
            child.join(60)
            assert child.exitcode == PREEMPTED_EXIT_CODE
        finally:
            end(child)
        assert attempt.writer.reader_status().reason == "preempted"
        outcome = read_outcome(run.assignment(2).dir.state / "consumer-outcome.json")
        assert (outcome.state, outcome.failure_class) == ("failed", "preempted")
    assert newest_complete(run.plan.dir.checkpoints).name == "step-7"

    with run.attempt(3) as attempt:
        attempt.publish(uncovered(run))
        run_consumer(run.assignment(3))
        assert attempt.writer.in_flight_remote() == 0
        assert attempt.store.key_count() == 0
    state_dir = run.assignment(3).dir.state
    result = read_outcome(state_dir / "consumer-outcome.json").result
    assert (result["steps"], result["samples"], result["samples_here"]) == (10, SAMPLES, SAMPLES - 7 * WINDOW)
    assert result["checkpoint"] == "step-10"
    assert result["store_counters"]["consumer_gets"] == SAMPLES - 7 * WINDOW
    progress = read_progress(state_dir / "consumer.json")
    assert (progress["phase"], progress["step"], progress["trained"]) == ("finished", 10, SAMPLES)
    final = load_file(run.plan.dir.checkpoints / "step-10" / "draft.safetensors")
    expected = load_file(calm / "draft.safetensors")
    assert final.keys() == expected.keys()
    assert all(torch.equal(final[name], expected[name]) for name in final)
    config = json.loads((run.plan.dir.checkpoints / "step-10" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["draft_vocab_size"] == 32


@pytest.mark.parametrize(
    ("moment", "acknowledged", "ahead"),
    [
        ("trained", 2, 3),
        ("acknowledged", 3, 0),
        pytest.param("trained", 2, 0, marks=pytest.mark.slow),
        pytest.param("acknowledged", 3, 3, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_was_killed_while_it_settled_a_window_accounts_for_every_sample(
    tmp_path, target_dir, endpoints, calm, moment, acknowledged, ahead
):
    """Between a step and its acknowledgement, and between that and the removal of the samples; and later steps, too."""
    run = Run(tmp_path / "storm", target_dir, endpoints)
    run.vocab_map.save(run.plan.dir.vocab_map)
    with run.attempt(1) as attempt:
        attempt.publish(range(SAMPLES))
        child = run.start(1, moment, 3, ahead)
        try:
            child.join(120)
        finally:
            end(child)
        assert child.exitcode == -signal.SIGKILL
        assert attempt.writer.reader_status().state == "lost"
        assert attempt.writer.consumed_remote() == acknowledged * WINDOW
        assert attempt.store.key_count() == SAMPLES - 2 * WINDOW
    saved = read_state(newest_complete(run.plan.dir.checkpoints))
    assert saved.cursor.trained == ([(0, saved.step * WINDOW - 1)] if saved.step else [])
    assert saved.step <= 3 + ahead + 1

    with run.attempt(2) as attempt:
        attempt.publish(uncovered(run))
        outcome = run_consumer(run.assignment(2))
        assert attempt.writer.in_flight_remote() == attempt.store.key_count(run.plan.run_id) == 0
    assert (outcome.samples, outcome.samples_here) == (SAMPLES, SAMPLES - saved.step * WINDOW)
    assert read_state(newest_complete(run.plan.dir.checkpoints)).cursor.trained == [(0, SAMPLES - 1)]
    final = load_file(run.plan.dir.checkpoints / "step-10" / "draft.safetensors")
    expected = load_file(calm / "draft.safetensors")
    assert all(torch.equal(final[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["trained", "acknowledged"])
def test_two_ranks_whose_first_was_killed_while_it_settled_a_window_account_for_every_sample(
    tmp_path, target_dir, endpoints, moment
):
    run = Run(tmp_path / "pair", target_dir, endpoints, training={"batch_size": 2, "processes": 2})
    run.vocab_map.save(run.plan.dir.vocab_map)
    for number, killed in ((1, (moment, 3, 2)), (2, ())):
        with run.attempt(number) as attempt:
            attempt.publish(uncovered(run))
            child = run.start_ranks(number, *killed)
            try:
                assert (child.wait(300) == 0) == (not killed)
            finally:
                child.kill()
                child.wait(60)
            if not killed:
                assert attempt.writer.in_flight_remote() == attempt.store.key_count(run.plan.run_id) == 0
    result = read_outcome(run.assignment(2).dir.state / "consumer-outcome.json").result
    assert (result["steps"], result["samples"]) == (10, SAMPLES)
    assert read_state(newest_complete(run.plan.dir.checkpoints)).cursor.trained == [(0, SAMPLES - 1)]


@pytest.mark.slow
def test_two_ranks_are_preempted_together(tmp_path, target_dir, endpoints):
    """torchrun passes SIGTERM on to both; they stop at the same step, and rank 0 leaves the word."""
    run = Run(tmp_path / "pair", target_dir, endpoints, training={"batch_size": 2, "processes": 2})
    run.vocab_map.save(run.plan.dir.vocab_map)
    with run.attempt(1) as attempt:
        attempt.publish(range(3 * WINDOW), ended=False)
        child = run.start_ranks(1)
        try:
            run.wait_for_step(lambda: child.poll() is None, 1, 3)
            child.send_signal(signal.SIGTERM)
            assert child.wait(60) != 0
        finally:
            child.kill()
            child.wait(60)
        assert attempt.writer.reader_status().reason == "preempted"
    outcome = read_outcome(run.assignment(1).dir.state / "consumer-outcome.json")
    assert (outcome.state, outcome.failure_class) == ("failed", "preempted")
    state = read_state(newest_complete(run.plan.dir.checkpoints))
    assert (state.step, state.cursor.trained) == (3, [(0, 11)])


@pytest.mark.slow
def test_rank_0_names_what_felled_another_rank(tmp_path, target_dir, endpoints):
    """The sample that rank 1 is to read has another target's identity: rank 0 only sees the connection break."""
    run = Run(tmp_path / "pair", target_dir, endpoints, training={"batch_size": 2, "processes": 2})
    run.vocab_map.save(run.plan.dir.vocab_map)
    with run.attempt(1) as attempt:
        refs = [ref for ordinal in (1, 0) for ref in attempt.stored([ordinal])]
        attempt.identity = msgspec.structs.replace(attempt.identity, target_model_version="another")
        refs += attempt.stored([2, 3])
        attempt.writer.publish_many(sorted(refs, key=lambda ref: -ref.num_tokens))
        child = run.start_ranks(1)
        try:
            assert child.wait(120) != 0
        finally:
            child.kill()
            child.wait(60)
        assert attempt.writer.reader_status().state == "failed"
    outcome = read_outcome(run.assignment(1).dir.state / "consumer-outcome.json")
    assert (outcome.state, outcome.failure_class) == ("failed", "bad_input")
    assert "another" in outcome.message


def test_a_producer_that_fails_before_its_vocabulary_map_is_not_waited_for(tmp_path, target_dir, endpoints):
    run = Run(tmp_path / "run", target_dir, endpoints)
    with run.attempt(1) as attempt:
        attempt.writer.fail("no such model", "bad_input")

        with pytest.raises(ProducerFailed, match="no such model"):
            run_consumer(run.assignment(1))

        assert attempt.writer.reader_status().state == "failed"
    outcome = read_outcome(run.assignment(1).dir.state / "consumer-outcome.json")
    assert (outcome.state, outcome.failure_class) == ("failed", "bad_input")


def test_waiting_for_the_vocabulary_map_has_an_end(tmp_path, target_dir, endpoints):
    run = Run(tmp_path / "run", target_dir, endpoints, orchestration={"stall_timeout_s": 0.5})
    with run.attempt(1), pytest.raises(ChannelStalled, match=r"vocab_map\.safetensors within 0\.5 s"):
        run_consumer(run.assignment(1))


@pytest.mark.parametrize("how", ["ended", "silent"])
def test_a_stop_is_heard_while_the_vocabulary_map_is_waited_for_and_the_channel_is_away(
    tmp_path, target_dir, endpoints, how
):
    stop, asked = StopSignal("consumer"), []
    with leaving_redis(tmp_path) as server:
        run = Run(tmp_path / "run", target_dir, endpoints, channel={"url": server.url})
        progress = run.assignment(1).dir.state / "consumer.json"

        def ask() -> None:
            eventually(lambda: read_progress(progress).get("phase") == "waiting for the vocabulary map")
            server.leave(how)
            threading.Event().wait(0.7)
            asked.append(time.monotonic())
            stop._on_signal(signal.SIGTERM, None)

        asking = threading.Thread(target=ask)
        asking.start()
        with pytest.raises(Preempted):
            run_consumer(run.assignment(1), stop=stop)
        took = time.monotonic() - asked[0]
        asking.join()
    assert took < 2.0


def test_training_goes_on_from_an_exported_draft(tmp_path, target_dir, endpoints, calm):
    """The imported weights are the first checkpoint, bit for bit; LM head rows follow their tokens."""
    run = Run(tmp_path / "more", target_dir, endpoints, draft={"init_from": str(calm), "vocab_size": 24})
    run.vocab_map = VocabMap.from_counts(torch.arange(64) % 5, 24)
    run.vocab_map.save(run.plan.dir.vocab_map)
    with run.attempt(1) as attempt:
        attempt.publish(range(WINDOW))
        run_consumer(run.assignment(1))

    exported = load_file(calm / "draft.safetensors")
    started = load_file(run.plan.dir.checkpoints / "step-0" / "draft.safetensors")
    same = [name for name in started if name not in ("lm_head.weight", "d2t", "t2d")]
    assert all(torch.equal(started[name], exported[name]) for name in same)
    old_ids = (exported["d2t"] + torch.arange(32)).tolist()
    new_ids = (started["d2t"] + torch.arange(24)).tolist()
    shared = [token for token in new_ids if token in old_ids]
    assert shared
    for token in shared:
        expected = exported["lm_head.weight"][old_ids.index(token)]
        assert torch.equal(started["lm_head.weight"][new_ids.index(token)], expected)


def test_an_exported_draft_of_another_target_is_refused(tmp_path, target_dir, endpoints, calm):
    source = Path(shutil.copytree(calm, tmp_path / "export"))
    run = Run(
        tmp_path / "more", target_dir, endpoints, draft={"init_from": str(source)}, target={"aux_layers": (0, 1, 2)}
    )
    config = json.loads((source / "config.json").read_text())
    config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [0, 1, 3]
    (source / "config.json").write_text(json.dumps(config))
    run.vocab_map.save(run.plan.dir.vocab_map)

    with run.attempt(1), pytest.raises(IncompatibleDraft, match="captured layers"):
        run_consumer(run.assignment(1))
