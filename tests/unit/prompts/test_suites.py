"""Suites of questions: asked turn by turn with the model's own answers, and counted by category."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from disagg_core.checks.suites import check_suites
from disagg_core.errors import PromptError
from disagg_core.evaluation.questions import read_suite
from disagg_core.evaluation.slices import results_of
from disagg_core.evaluation.speculative import Generation
from disagg_core.evaluation.suites import run_suite
from disagg_core.prompts.encode import PromptEncoder
from disagg_core.prompts.pinned import DataChanged
from disagg_core.report.suites import suite_figures, suite_rows
from disagg_core.run_spec.yaml_file import load_spec
from tests.unit.prompts import styles, templates
from tests.unit.prompts.test_prompts import conversations, spec_of, write

pytestmark = pytest.mark.unit

SPEC_BENCH = [
    {"question_id": 1, "category": "math", "turns": ["one?", "two?"]},
    {"question_id": 2, "category": "math", "turns": ["99?"]},
    {"question_id": 3, "category": "writing", "turns": ["hello", "there", "question"]},
]


@pytest.fixture
def chatty(tokenizer):
    """The tokenizer with a ChatML template."""
    tokenizer.chat_template = templates.CHATML
    yield tokenizer
    tokenizer.chat_template = None


class Model:
    """Answers every prompt with its own number as a word, over passes that kept 1 and 3 drafted tokens."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.asked = []
        self.batches = []

    def __call__(self, prompts):
        self.batches.append(len(prompts))
        generations = []
        for ids in prompts:
            self.asked.append("".join(self.tokenizer.convert_ids_to_tokens(ids)))
            tokens = self.tokenizer.convert_tokens_to_ids([str(len(self.asked)), "</s>"])
            generations.append(Generation(tokens, [1, 3] if "99" in self.asked[-1] else [0]))
        return generations


def asked(path, tokenizer, **how):
    spec = spec_of("p")
    questions, _ = read_suite(path, spec.data)
    model = Model(tokenizer)
    how = {"most_prompt_tokens": 500, **how}
    measured = run_suite(questions, PromptEncoder(spec, tokenizer), {"own": model}, **how)
    return results_of(measured, ())["own"], model


def test_each_turn_follows_the_models_own_answers(tmp_path, chatty):
    result, model = asked(write(tmp_path / "s.jsonl", SPEC_BENCH), chatty)
    assert model.batches == [2, 1, 1, 1, 1], "those of a category together, turn by turn"
    head = "<|im_start|>system\nBehelpful.<|im_end|>\n"
    said = [text.replace(" ", "").replace("<unk>", "").removeprefix(head) for text in model.asked]
    opened = "<|im_start|>assistant\n"
    assert said[3].endswith(opened)
    assert [text.count("<|im_start|>user") for text in said] == [1, 1, 2, 1, 2, 3]
    assert f"{opened}1<|im_end|>" in said[2], "the answer to the first turn stands before the second"
    assert f"{opened}4<|im_end|>" in said[5]
    assert f"{opened}5<|im_end|>" in said[5]
    assert (result.total.questions, result.total.answers, result.total.tokens) == (3, 6, 12)


def test_figures_are_by_category_and_by_length(tmp_path, chatty):
    result, _ = asked(write(tmp_path / "s.jsonl", SPEC_BENCH), chatty)
    math, writing = result.categories["math"], result.categories["writing"]
    assert (math.target_passes, math.accept_length, math.per_position) == (4, 2.0, [0.5, 0.25, 0.25])
    assert math.interval == (1.0, 3.0), "between the two questions"
    assert (writing.accept_length, writing.interval) == (1.0, (1.0, 1.0))
    assert result.total.accept_length == 1 + 4 / 7
    assert set(result.prompt_lengths) == {"0-127"}
    assert math.tokens_per_second > 0
    assert math.tokens_per_second_interval is None, "one batch tells nothing of how it varies"
    assert result.total.tokens_per_second_interval is not None
    assert result.by_question == [(2, 2), (6, 2), (3, 3)]
    figures = suite_figures(json.loads(json.dumps({"bench": asdict(result)})))
    rows = list(suite_rows(figures, parts=True))
    labels = ["bench", "bench: math", "bench: writing", "bench: prompts of 0-127 tokens"]
    assert [row[0] for row in rows] == [*labels, "bench: tokens 0-31 of the answer"]
    assert rows[1][2] == "2.00 (1.00 to 3.00)"
    assert [row[0] for row in suite_rows(figures)] == labels[:3], "the table for people is short"


def test_passes_are_told_apart_by_where_in_the_answer_they_began(tmp_path, chatty):
    spec = spec_of("p")
    questions, _ = read_suite(write(tmp_path / "s.jsonl", SPEC_BENCH[1:2]), spec.data)
    passes = [3] * 8 + [0] * 4  # a pass of 4 tokens begins at 1, 5, ..., 29, then one of 1 at 33, 34, 35, 36

    def decode(prompts):
        return [Generation([5] * 37, passes) for _ in prompts]

    def unordered(prompts):
        return [Generation([5] * 37, passes, in_order=False) for _ in prompts]

    decoders = {"own": decode, "served": unordered}
    results = results_of(run_suite(questions, PromptEncoder(spec, chatty), decoders, most_prompt_tokens=500), ())
    places = results["own"].positions
    assert {place: found.accept_length for place, found in places.items()} == {"0-31": 4.0, "32-127": 1.0}
    assert places["0-31"].per_position == [1.0, 1.0, 1.0]
    assert results["served"].positions == {}, "a server does not say which pass came when"
    assert results["served"].total.accept_length == results["own"].total.accept_length


def test_decoders_take_turns_and_are_compared_pair_by_pair(tmp_path, chatty):
    """Hard and easy questions differ more than the two drafts; on each, one keeps a token more than the other."""
    questions = [{"question_id": n, "category": "ab"[n % 2], "turns": [f"{n}?"]} for n in range(24)]
    spec = spec_of("p")
    asked, _ = read_suite(write(tmp_path / "s.jsonl", questions), spec.data)
    order = []

    def keeping(name, more):
        def decode(prompts):
            order.append(name)
            return [Generation([5, 6], [sum(ids) % 4 * 3 + more] * 5) for ids in prompts]

        return decode

    decoders = {name: keeping(name, more) for name, more in (("own", 1), ("champion", 0), ("plain", 0))}
    measured = run_suite(asked, PromptEncoder(spec, chatty), decoders, most_prompt_tokens=500, batch_size=3)
    assert [order[start : start + 3] for start in (0, 3, 6)] == [
        ["own", "champion", "plain"],
        ["champion", "plain", "own"],
        ["plain", "own", "champion"],
    ]
    results = results_of(measured, ("plain", "champion"))
    own, champion = results["own"], results["champion"]
    assert set(own.categories) == {"a", "b"}
    assert set(own.total.against) == {"plain", "champion"}
    found = own.total.against["champion"].accept_length
    assert found.value == pytest.approx(own.total.accept_length / champion.total.accept_length)
    assert own.total.interval[0] < champion.total.accept_length, "apart they tell nothing"
    assert 1.0 < found.interval[0] < found.value < found.interval[1]
    assert own.total.against["plain"].tokens_per_second.value > 0
    assert own.categories["a"].against["champion"].tokens_per_second.interval is not None


def test_any_format_of_prompts_is_a_suite(tmp_path, chatty):
    records = [
        {"messages": [message for record in conversations(2) for message in record["messages"]]},
        {"prompt": "question", "response": "answer", "category": "one"},
        {"text": "hello there"},
        {"input_ids": [3, 4, 5]},
        {"messages": []},
    ]
    spec = spec_of("p", data={"max_bad_records": 0.5})
    path = write(tmp_path / "s.jsonl", records)
    questions, pin = read_suite(path, spec.data)
    assert [len(question.turns) for question in questions] == [2, 0, 0, 0]
    assert [question.category for question in questions] == ["all", "one", "all", "all"]
    model = Model(chatty)
    measured = run_suite(questions, PromptEncoder(spec, chatty), {"own": model}, most_prompt_tokens=500)
    assert len(measured["own"].answers) == 5
    assert "answer0" not in model.asked[-1].replace(" ", ""), "the data's own answers are not read"
    write(path, records[:2])
    with pytest.raises(DataChanged):
        read_suite(path, spec.data, pin)


def test_turns_without_room_are_skipped_by_name(tmp_path, chatty):
    result, model = asked(write(tmp_path / "s.jsonl", SPEC_BENCH), chatty, most_prompt_tokens=30)
    assert set(result.skipped) == {"s.jsonl:1", "s.jsonl:3"}
    assert "there is room for 30" in result.skipped["s.jsonl:1"]
    assert (result.total.questions, len(model.asked)) == (3, 4)


def test_a_suite_is_checked_before_a_run(tmp_path, chatty):
    good, bad = write(tmp_path / "good.jsonl", SPEC_BENCH), write(tmp_path / "bad.jsonl", [{"turns": []}])
    spec = spec_of("p", evaluation={"suites": {"bench": str(good)}})
    assert set(check_suites(spec, chatty, None, None)) == {"bench"}
    for path, what in ((bad, r"turns: expected a list of questions"), (tmp_path / "no.jsonl", "no such file")):
        broken = spec_of("p", evaluation={"suites": {"bench": str(path)}})
        with pytest.raises(PromptError, match=rf"evaluation\.suites\.bench: .*{what}"):
            check_suites(broken, chatty, None, None)
    chatty.chat_template = styles.MARKED_PHI3.replace("{%- for", "{{ raise_exception('never') }}{%- for", 1)
    with pytest.raises(PromptError, match=r"none of the first 3 can be asked; good\.jsonl:1: .*never"):
        check_suites(spec, chatty, None, None)


def test_suites_lie_beside_the_run_document(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "target: {model: ./t}\ndata: {prompts: p.jsonl}\nevaluation: {suites: {bench: s.jsonl}}\n"
    )
    assert load_spec(tmp_path / "run.yaml").evaluation.suites == {"bench": str(tmp_path / "s.jsonl")}
