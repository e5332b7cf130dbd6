"""The evaluation process: a target and two drafts on disk in, one result file for each draft out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from disagg_core.cli import drafts as commands
from disagg_core.contracts import Capture
from disagg_core.drafts.eagle3 import Eagle3Config, Eagle3Draft, training_time_test
from disagg_core.drafts.eagle_layers import default_layers
from disagg_core.drafts.export import export_draft
from disagg_core.errors import BadInput, IncompatibleDraft, PromptError, SpecError
from disagg_core.report.suites import suite_figures
from disagg_core.roles.evaluation import EvaluationRequest, main, read_draft, read_prompts, run_evaluation
from disagg_core.roles.server_evaluation import Servers, run_server_evaluation
from disagg_core.run.plan import RunPlan
from disagg_core.run.watermarks import Watermarks
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.results import ServerEvaluationSection
from disagg_core.target.facts import read_target_facts
from tests.unit.evaluation.models import make_target
from tests.unit.evaluation.test_server import Answer, reply, server

pytestmark = pytest.mark.integration

VOCAB = 64


def train(draft: Eagle3Draft, target: LlamaForCausalLM, *, steps: int) -> None:
    """A few steps on the target's own greedy continuations."""
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(3, VOCAB, (64, 4), generator=generator)
    ids = target.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    weights = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3)
    for _ in range(steps):
        rows = ids[torch.randperm(len(ids), generator=generator)[:8]]
        with torch.no_grad():
            hidden = target(rows, output_hidden_states=True).hidden_states
        batch = {
            "input_ids": rows,
            "attention_mask": torch.ones_like(rows),
            "loss_mask": torch.ones_like(rows),
            "aux_hidden_states": torch.cat([hidden[layer + 1] for layer in draft.config.aux_layer_ids or ()], dim=-1),
            "last_hidden_state": hidden[-1],
        }
        lm_head = target.get_output_embeddings().weight
        training_time_test(draft, batch, lm_head=lm_head, ttt_length=3).total.backward()
        optimizer.step()
        optimizer.zero_grad()


def save_checkpoint(draft: Eagle3Draft, path: Path) -> Path:
    path.mkdir(parents=True)
    save_file(draft.serving_state_dict(), path / "draft.safetensors")
    (path / "config.json").write_text(json.dumps(draft.config.to_dict()))
    return path


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    """A run over a saved target with the drafts of step 0 and step 30."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("run")
    target = make_target(VOCAB, context=0.01)
    target.save_pretrained(root / "target")
    spec = RunSpec.model_validate(
        {
            "target": {"model": str(root / "target"), "device": "cpu", "dtype": "float32"},
            "data": {"prompts": "unused.jsonl"},
            "evaluation": {"prompts": 6, "max_new_tokens": 24, "draft_tokens": 4},
        }
    )
    facts = read_target_facts(spec.target)
    plan = RunPlan(
        run_id="test",
        root=root,
        spec=spec,
        target=facts,
        capture=Capture(default_layers(facts.num_layers), last_hidden_state=True),
        tokenizer_version="none",
        total_prompts=None,
        total_steps=None,
        store_capacity=1,
        watermarks=Watermarks(window=1, high_refs=1),
    )
    torch.manual_seed(1)
    draft = Eagle3Draft(Eagle3Config.for_target(facts, spec.draft).model_copy(update={"initializer_range": 0.1}))
    draft.reset_parameters()
    draft.set_embedding(target.get_input_embeddings().weight)
    save_checkpoint(draft, plan.dir.checkpoints / "step-0")
    train(draft, target, steps=30)
    save_checkpoint(draft, plan.dir.checkpoints / "step-30")
    prompts = torch.randint(3, VOCAB, (8, 5), generator=torch.Generator().manual_seed(9)).tolist()
    plan.dir.evaluation.mkdir()
    lines = [json.dumps({"input_ids": ids}) for ids in prompts]
    (plan.dir.evaluation / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return plan


def test_training_raises_the_accept_length_and_both_results_are_lossless(plan: RunPlan, tmp_path: Path) -> None:
    request = EvaluationRequest(
        plan=plan,
        checkpoints=(("before", plan.dir.checkpoints / "step-0"), ("after", plan.dir.checkpoints / "step-30")),
        outputs={"after": tmp_path / "elsewhere.json"},
        threads=1,
    )
    (tmp_path / "request.json").write_text(request.model_dump_json())

    command = [sys.executable, "-m", "disagg_core.roles.evaluation", str(tmp_path / "request.json")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)

    assert process.returncode == 0, process.stderr
    before = json.loads((plan.dir.evaluation / "before.json").read_text())
    after = json.loads((tmp_path / "elsewhere.json").read_text())
    assert before["lossless"] is after["lossless"] is True
    assert (before["prompts"], before["draft_tokens"], len(before["per_position"])) == (6, 4, 4)
    assert before["tokens"] / before["target_passes"] == before["accept_length"]
    assert 1.0 <= before["accept_length"] < 1.2
    assert after["accept_length"] > before["interval"][1] + 0.3
    assert after["interval"][0] <= after["accept_length"] <= after["interval"][1]
    progress = json.loads((plan.dir.evaluation / "progress.json").read_text())
    assert (progress["drafts"], progress["done"], progress["total"]) == ("before, after, plain", 18, 18)


def with_suite(plan: RunPlan, folder: Path, **evaluation: object) -> RunPlan:
    """Return `plan` with a suite of two categories, and give its target a tokenizer and a template."""
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m.role[0] | replace('u', 'w1 ') | replace('a', 'w2 ') + m.content + ' ' }}"
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", chat_template=template + "{% endfor %}w2"
    ).save_pretrained(plan.spec.target.model)
    rows = [
        {"question_id": n, "category": "even" if n % 2 == 0 else "odd", "turns": [f"w{n + 5} w{n + 9}", f"w{n + 7}"]}
        for n in range(6)
    ]
    (folder / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = plan.spec.evaluation.model_copy(
        update={"suites": {"bench": str(folder / "bench.jsonl")}, "max_new_tokens": 12, **evaluation}
    )
    return plan.model_copy(update={"spec": plan.spec.model_copy(update={"evaluation": section})})


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_suites_are_measured_by_category_over_several_turns(plan: RunPlan, tmp_path: Path, temperature: float) -> None:
    asking = with_suite(plan, tmp_path, suite_temperature=temperature)

    result = run_evaluation(asking, plan.dir.checkpoints / "step-30", "suites")

    bench = result["suites"]["bench"]
    assert (bench["total"]["questions"], bench["total"]["answers"], bench["skipped"]) == (6, 12, {})
    assert 12 < bench["total"]["tokens"] <= 12 * 12
    assert [bench["categories"][name]["questions"] for name in ("even", "odd")] == [3, 3]
    low, high = bench["total"]["interval"]
    assert 1.0 <= low <= bench["total"]["accept_length"] <= high <= 5.0
    assert json.loads((plan.dir.evaluation / "suites.json").read_text()) == json.loads(json.dumps(result))
    assert sum(tokens for tokens, _ in bench["by_question"]) >= bench["total"]["tokens"] - 12
    assert set(bench["positions"]) == {"0-31"}
    against = bench["categories"]["even"]["against"]
    assert set(against) == {"plain"}
    assert against["plain"]["tokens_per_second"]["value"] > 0
    few = run_evaluation(with_suite(plan, tmp_path, suite_prompts=1), plan.dir.checkpoints / "step-30", "few")
    assert few["suites"]["bench"]["total"]["questions"] == 2


def test_candidate_incumbent_and_plain_decoding_are_paired_on_the_same_prompts(plan: RunPlan, tmp_path: Path) -> None:
    asking = with_suite(plan, tmp_path, batch_size=2)

    result = run_evaluation(asking, plan.dir.checkpoints / "step-30", "better", against=plan.dir.checkpoints / "step-0")

    other = json.loads((plan.dir.evaluation / "better-against.json").read_text())
    assert set(result["suites"]) == {"held-out", "bench"}
    for suite, measured in result["suites"].items():
        gain = measured["total"]["against"]["incumbent"]["accept_length"]
        length = other["suites"][suite]["total"]["accept_length"]
        assert gain["value"] == pytest.approx(measured["total"]["accept_length"] / length)
        assert gain["interval"][0] > 1.0, "the draft that was trained is better than the one that was not"
    figures = suite_figures(json.loads(json.dumps(result["suites"])))
    held_out = figures[0]
    assert (held_out.suite, held_out.kind, held_out.questions) == ("held-out", "suite", 6)
    assert held_out.gain is not None
    assert held_out.speedup is not None
    assert held_out.speedup.interval is not None, "three batches of two"
    with pytest.raises(BadInput, match="expected another name"):
        run_evaluation(asking, plan.dir.checkpoints / "step-30", "incumbent")


def test_the_command_measures_a_suite_that_is_given(
    plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "find_run", lambda *_: plan.dir)
    monkeypatch.setattr(commands, "read_plan", lambda _: plan)
    with_suite(plan, tmp_path)

    commands.evaluate(
        "test",
        draft=str(plan.dir.checkpoints / "step-30"),
        suites=[f"mine={tmp_path / 'bench.jsonl'}"],
        overrides=["max_new_tokens=6", "draft_tokens=2"],
    )

    shown = capsys.readouterr().out
    assert "mine: odd" in shown
    assert "tokens/s" in shown
    with pytest.raises(SpecError, match=r"evaluation\.draft_tokens"):
        commands.evaluate("test", overrides=["draft_tokens=0"])


def test_an_exported_draft_decodes_like_its_checkpoint(plan: RunPlan, tmp_path: Path) -> None:
    """Through bf16 and back the same drafts come out, but for tokens that were about as likely."""
    export_draft(plan.dir.checkpoints / "step-30", tmp_path / "out", "speculators")

    trained = run_evaluation(plan, plan.dir.checkpoints / "step-30", "trained")
    exported = run_evaluation(plan, tmp_path / "out", "exported")

    assert exported["lossless"]
    assert exported["accept_length"] == pytest.approx(trained["accept_length"], abs=0.3)
    assert json.loads((plan.dir.evaluation / "exported.json").read_text()) == exported


def test_the_command_offers_the_formats_of_the_runs_method(
    plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "find_run", lambda *_: plan.dir)
    monkeypatch.setattr(commands, "read_plan", lambda _: plan)
    draft = str(plan.dir.checkpoints / "step-30")

    commands.export("test", tmp_path / "served", draft=draft)
    commands.export("test", tmp_path / "named", "speculators", draft=draft)
    with pytest.raises(BadInput, match=r"expected one of sglang \(SGLang\); hf .*; speculators \(vLLM\), found 'gguf'"):
        commands.export("test", tmp_path / "other", "gguf", draft=draft)

    assert f"{tmp_path / 'served'}: 15 tensors" in capsys.readouterr().out
    config = json.loads((tmp_path / "named/config.json").read_text())["speculators_config"]
    assert config["verifier"] == {"name_or_path": plan.spec.target.model, "architectures": ["LlamaForCausalLM"]}
    assert config["proposal_methods"][0]["speculative_tokens"] == 4


def test_a_draft_whose_files_name_no_layers_reads_those_of_the_run(plan: RunPlan, tmp_path: Path) -> None:
    source = Path(shutil.copytree(plan.dir.checkpoints / "step-0", tmp_path / "draft"))
    document = json.loads((source / "config.json").read_text())
    del document["eagle_config"]
    (source / "config.json").write_text(json.dumps(document))

    deeper = plan.target.model_copy(update={"num_layers": 8})

    draft = read_draft(source, plan.model_copy(update={"target": deeper}))

    assert draft.config.layers == default_layers(8)


def test_a_request_that_cannot_be_met_ends_the_process_with_its_reason(
    plan: RunPlan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = EvaluationRequest(plan=plan, checkpoints=(("before", tmp_path / "nowhere"),))
    (tmp_path / "request.json").write_text(request.model_dump_json())
    (tmp_path / "broken.json").write_text('{"plan": {}}')

    assert main([str(tmp_path / "request.json")]) == 1
    assert "IncompatibleDraft" in caplog.messages[-1]
    assert str(tmp_path / "nowhere") in caplog.messages[-1]
    assert main([str(tmp_path / "broken.json")]) == 1
    assert "expected an evaluation request" in caplog.messages[-1]
    assert main([]) == 2


def test_a_result_cannot_go_to_an_unknown_name(plan: RunPlan) -> None:
    with pytest.raises(ValueError, match=r"outputs: no checkpoint is called \['afer'\]"):
        EvaluationRequest(plan=plan, checkpoints=(("after", Path("x")),), outputs={"afer": Path("y")})
    with pytest.raises(ValueError, match=r"references: no checkpoint is called \['incumbent'\]"):
        EvaluationRequest(plan=plan, checkpoints=(("after", Path("x")),), references=("incumbent",))
    with pytest.raises(ValueError, match="expected unlike names, none of them 'plain'"):
        EvaluationRequest(plan=plan, checkpoints=(("plain", Path("x")),))


def test_a_result_stays_in_the_evaluation_folder(plan: RunPlan) -> None:
    with pytest.raises(BadInput, match=r"found '\.\./\.\./run'"):
        run_server_evaluation(plan, Servers("http://127.0.0.1:9"), "../../run")
    with pytest.raises(BadInput, match="expected a name of letters"):
        run_evaluation(plan, plan.dir.checkpoints / "step-0", "")


def test_servers_take_turns_at_every_load(plan: RunPlan, tmp_path: Path) -> None:
    """Servers in place of real ones: what they are asked, in which order, and what is made of their counters."""
    order: list[str] = []

    def answering(name: str, kept: int | None) -> Answer:
        def answer(request: dict[str, object]) -> tuple[int, object]:
            order.append(name)
            found = reply([0] * (kept or 0) + [2], 4)
            if kept is None:
                found["meta_info"] = {"completion_tokens": 5}
            return 200, {**found, "output_ids": [3, 4, 5, 6, 7]}

        return answer

    asking = with_suite(plan, tmp_path, server=ServerEvaluationSection(concurrency=(1, 3)), suite_prompts=2)
    with (
        server(answering("draft", 3)) as (url, _),
        server(answering("plain", None)) as (plain, _),
        server(answering("incumbent", 1)) as (champion, _),
    ):
        result = run_server_evaluation(asking, Servers(url, plain, champion), "served")

    assert json.loads((plan.dir.evaluation / "served.json").read_text()) == json.loads(json.dumps(result))
    assert (result["accept_length"], result["draft_tokens"], result["concurrency"]) == (4.0, 4, 1)
    assert set(result["by_concurrency"]) == {"1", "3"}
    assert order[:3] == ["draft", "plain", "incumbent"], "one prompt each before anything is timed"
    assert order[3:15] == [
        *("draft", "draft", "plain", "plain", "incumbent", "incumbent"),
        *("plain", "plain", "incumbent", "incumbent", "draft", "draft"),
    ]
    for suites in result["by_concurrency"].values():
        for suite in ("held-out", "bench"):
            total = suites[suite]["total"]
            assert total["against"]["incumbent"]["accept_length"]["value"] == 2.0
            assert total["against"]["plain"]["accept_length"] is None, "a server without a draft counts no passes"
            assert total["against"]["plain"]["tokens_per_second"]["value"] > 0
        assert set(suites["bench"]["categories"]) == {"even", "odd"}
        assert suites["bench"]["positions"] == {}


def test_a_draft_of_another_target_is_refused(plan: RunPlan) -> None:
    facts = plan.target.model_copy(update={"vocab_size": 70, "num_layers": 8})
    other = {"target": facts}

    with pytest.raises(IncompatibleDraft, match=r"vocab_size: expected 70, found 64; layers: expected \(1, 3, 4\)"):
        read_draft(plan.dir.checkpoints / "step-0", plan.model_copy(update=other))


def test_prompts_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    with pytest.raises(PromptError, match="no such file"):
        read_prompts(file, 4)
    file.write_text('{"input_ids": [1, 2]}\n{"input_ids": []}\n')
    with pytest.raises(PromptError, match="line 2"):
        read_prompts(file, 4)
    file.write_text("")
    with pytest.raises(PromptError, match="at least one prompt"):
        read_prompts(file, 4)
