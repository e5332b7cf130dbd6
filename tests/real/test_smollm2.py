"""A real model: 30 layers, a vocabulary of 49,152, tied embeddings and a chat template that people wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from disagg_core.contracts import Capture, PromptTask, RunIdentity
from disagg_core.drafts.export import import_draft
from disagg_core.engines.contract import Captured
from disagg_core.engines.generation import Sampling, continue_tasks
from disagg_core.engines.transformers import TransformersTarget
from disagg_core.report.archive import verify_archive
from disagg_core.run_spec.document import RunSpec
from disagg_core.target.facts import TargetFacts, read_target_facts
from disagg_core.target.loading import load_target
from tests.kit.runs import Draftline, report_of, settings

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

LAYERS = (2, 15, 27)
MOST = 2.5e9
DOCUMENT = Path(__file__).resolve().parents[2] / "infra" / "runs" / "smollm2.yaml"
PEAK = Path(__file__).with_name("peak.py")
SHORT = (
    "data.limit=24",
    "data.epochs=2",
    "data.generate.max_new_tokens=24",
    "draft.vocab_size=2048",
    "training.batch_size=4",
    "evaluation.prompts=4",
    "evaluation.max_new_tokens=16",
)


def in_float32(spec: RunSpec) -> RunSpec:
    return spec.model_copy(update={"target": spec.target.model_copy(update={"dtype": "float32"})})


def an_identity(facts: TargetFacts, capture: Capture) -> RunIdentity:
    return RunIdentity(
        run_id="real",
        attempt=1,
        strategy="eagle3",
        target_model_version=facts.version,
        tokenizer_version="",
        vocab_map_version="",
        draft_weight_version=0,
        capture=capture,
        dtype=facts.dtype,
    )


def test_what_is_known_of_it_before_it_is_loaded(facts: TargetFacts) -> None:
    found = (facts.num_layers, facts.hidden_size, facts.vocab_size, facts.tie_word_embeddings, facts.eos_token_ids)
    assert found == (30, 576, 49152, True, (2,))


def test_a_capture_is_what_transformers_calls_its_hidden_states(spec: RunSpec, chats: list[PromptTask]) -> None:
    spec = in_float32(spec)
    facts = read_target_facts(spec.target)
    model = load_target(spec.target, facts)
    target_capture = Capture(LAYERS, last_hidden_state=True)
    target = TransformersTarget(spec.target, facts, target_capture, model=model)
    target.prepare(an_identity(facts, target_capture))
    for outcome in target.capture(chats[:6], avoid={}):
        assert isinstance(outcome, Captured)
        with torch.inference_mode():
            hidden = model(torch.tensor([outcome.task.input_ids]), output_hidden_states=True).hidden_states
        expected = torch.cat([hidden[layer + 1][0] for layer in LAYERS], dim=-1)
        torch.testing.assert_close(outcome.tensors["aux_hidden_states"], expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(outcome.tensors["last_hidden_state"], hidden[-1][0], rtol=1e-5, atol=1e-4)
    target.close()


def test_greedy_answers_are_those_of_transformers(spec: RunSpec, chats: list[PromptTask]) -> None:
    spec = in_float32(spec)
    facts = read_target_facts(spec.target)
    model = load_target(spec.target, facts)
    greedy = Sampling(max_new_tokens=16, max_tokens=256, temperature=0, top_p=1, seed=0)
    device = torch.device("cpu")
    ours = continue_tasks(model, chats[:4], greedy, eos_token_ids=facts.eos_token_ids, device=device)
    for task, tokens in zip(chats, ours, strict=False):
        ids = torch.tensor([task.input_ids])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert tokens == theirs[0, ids.shape[1] :].tolist()


def test_the_producers_memory_follows_the_batch(chats: list[PromptTask], tmp_path: Path) -> None:
    """64 answers at a time, in a process of its own: the weights are 0.27 GB, the batch's keys and values 0.3 GB."""
    tasks = tmp_path / "tasks.json"
    tasks.write_bytes(msgspec.json.encode(chats))
    done = subprocess.run(
        [sys.executable, PEAK, str(tasks), "24"], capture_output=True, text=True, check=True, cwd=PEAK.parents[2]
    )
    captured, peak = map(int, done.stdout.split())
    assert captured == len(chats)
    assert peak < MOST


def test_a_whole_run_continues_each_prompt_once_and_is_lossless(home: Path, draftline: Draftline) -> None:
    run = draftline("run", str(DOCUMENT), *settings(*SHORT))
    output, _ = run.communicate(timeout=1700)
    assert run.returncode == 0, output
    assert "prompts for the vocabulary map" in output

    report = report_of(home)
    accounting = report.accounting
    assert accounting is not None
    assert (accounting.prompts, accounting.published, accounting.trained) == (48, 48, 48)
    assert (accounting.rejected, accounting.quarantined, accounting.store_keys_left) == (0, 0, 0)
    assert report.evaluation is not None
    assert report.evaluation.lossless

    _, *groups = (Path(report.run_dir) / "continuations.jsonl").read_text().splitlines()
    assert sum(len(json.loads(group)["keys"]) for group in groups) == 24  # of two epochs
    assert report.archive is not None
    assert verify_archive(report.archive.url) > 10
    _, config, state = import_draft(Path(report.archive.url) / "export")
    assert (config.draft_vocab_size, config.vocab_size) == (2048, 49152)
    assert state["lm_head.weight"].shape == (2048, 576)
