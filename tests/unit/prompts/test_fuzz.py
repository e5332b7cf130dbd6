"""Thousands of broken records: each is used or rejected by name, nothing is raised, and the counts add up."""

from __future__ import annotations

import copy
import json
import random

import pytest

from disagg_core.contracts import PromptTask
from disagg_core.prompts.inspection import inspect_prompts
from disagg_core.prompts.pool import EncodedPrompts, RejectedPrompt
from tests.unit.prompts import templates
from tests.unit.prompts.test_prompts import spec_of

pytestmark = pytest.mark.unit

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
BASES = [
    {"messages": [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": "a question"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "well"},
        {"role": "tool", "content": "2", "tool_call_id": "c", "name": "add"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nan answer"},
    ], "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": True}},
    {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "there"}], "system": "S"},
    {"prompt": "a question", "response": "an answer"},
    {"prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}],
     "completion": [{"role": "assistant", "content": "a"}]},
    {"prompt": "q", "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    {"instruction": "add", "input": "1", "output": "2", "history": [["a", "b"]]},
    {"turns": ["first", "second"], "question_id": 1, "category": "math"},
    {"text": "running text " * 5},
    {"input_ids": [1, 2, 3, 4, 5, 6], "loss_mask": [0, 0, 1, 1, 1, 1]},
]  # fmt: skip
VALUES = [
    None, True, 0, -1, 2**70, 1.5, float("nan"), float("inf"), "", " ", "\n" * 40, "\ud83d", "a\ud83db", "\0", "\ufeff",
    "\u202e\u0301x", "👩‍👩‍👧‍👦", "</think>", "<|im_end|>", "{{ x }}", "{% raise %}",
    "[", "{", "[1]", '{"a": 1}', "null", [], {}, [[]], [None],
    {"role": "user"}, {"role": "user", "content": "x"}, {"type": "image_url"}, [1, 2], ["a", "b"], "x" * 5000,
]  # fmt: skip


def nested(depth: int, kind: int) -> object:
    value: object = "x"
    for _ in range(depth):
        value = [value] if kind else {"a": value}
    return value


def places(value: object, path: tuple = ()) -> list[tuple]:
    """Return the paths to every part of `value`."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in parts for place in places(part, (*path, key)))]


def mutated(rng: random.Random) -> bytes:
    """Return a line with a record that has between none and four faults, of value, structure or bytes."""
    record = copy.deepcopy(rng.choice(BASES))
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        path = rng.choice(places(record))
        if not path:
            continue
        node = record
        for key in path[:-1]:
            node = node[key]
        fault = rng.random()
        if fault < 0.2:
            del node[path[-1]]
        elif fault < 0.3 and isinstance(node, dict):
            node[rng.choice(["extra", "role", "content", "tools", "system", "\ud83d"])] = rng.choice(VALUES)
        elif fault < 0.4:
            node[path[-1]] = nested(rng.choice([1, 10, 63, 70, 300]), rng.randrange(2))
        else:
            node[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    line = json.dumps(record, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    if rng.random() < 0.1:
        line = line[: rng.randrange(len(line)) + 1]
    if rng.random() < 0.1:
        at = rng.randrange(len(line))
        line = line[:at] + bytes([rng.randrange(256)]) + line[at + rng.randrange(2) :]
    if rng.random() < 0.02:
        line = b"[" * 5000 + line
    return line.replace(b"\n", b" ").replace(b"\r", b" ") or b"{}"


def check(tmp_path, tokenizer, count: int, seed: int) -> None:
    rng = random.Random(seed)
    lines = [line if line.strip() else b"{}" for line in (mutated(rng) for _ in range(count))]
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"{}\n" + b"\n".join(lines) + b"\n")
    spec = spec_of(path, data={"max_bad_records": 1.0, "max_tokens": 256}, evaluation={"prompts": 0})
    for template in (templates.CHATML, templates.THINKING):
        tokenizer.chat_template = template
        found = inspect_prompts(spec, tokenizer)
        assert found.records == count + 1 == found.usable + found.bad.count
        assert found.encoded == found.usable == len(found.tokens) + found.refused.count
        assert sum(reason.count for reason in found.bad.reasons.values()) == found.bad.count
        pool = EncodedPrompts(spec, tokenizer)
        outcomes = [pool.task(ordinal) for ordinal in range(pool.end)]
        pool.close()
        tasks = [outcome for outcome in outcomes if isinstance(outcome, PromptTask)]
        rejected = [outcome for outcome in outcomes if isinstance(outcome, RejectedPrompt)]
        assert len(tasks) + len(rejected) == count + 1
        assert len(tasks) == len(found.tokens)
        assert all(outcome.reason and outcome.source.startswith("p.jsonl:") for outcome in rejected)
        assert len({outcome.source for outcome in outcomes}) == count + 1
        assert len(tasks) > count // 5, "the faults leave some records as they were"


@pytest.fixture
def template_of_its_own(tokenizer):
    yield
    tokenizer.chat_template = None


@pytest.mark.usefixtures("template_of_its_own")
def test_broken_records_are_rejected_by_name(tmp_path, tokenizer):
    check(tmp_path, tokenizer, 500, seed=1)


@pytest.mark.slow
@pytest.mark.usefixtures("template_of_its_own")
def test_ten_thousand_broken_records_are_rejected_by_name(tmp_path, tokenizer):
    check(tmp_path, tokenizer, 10_000, seed=2)
