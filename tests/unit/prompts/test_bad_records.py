"""Records that cannot be used: each rejected with place and reason, up to a share; the others are trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from disagg_core.errors import PromptError
from disagg_core.prompts.bad_records import Refusals, count_reasons
from disagg_core.prompts.checks import validate_prompts
from disagg_core.prompts.pool import EncodedPrompts
from disagg_core.rollout.prompt_source import PromptSource
from tests.unit.prompts import templates
from tests.unit.prompts.test_prompts import conversations, spec_of, write

pytestmark = pytest.mark.unit

USER = {"role": "user", "content": "a question"}
ANSWER = {"role": "assistant", "content": "an answer"}


def said(*turns) -> bytes:
    return json.dumps({"messages": list(turns)}).encode()


BAD = {
    "unknown role": (said(USER, {"role": "narrator", "content": "x"}), "unknown role 'narrator'"),
    "no role": (said(USER, {"content": "x"}), "unknown role None"),
    "no conversation": (said(), "found an empty conversation"),
    "no list": (b'{"messages": "hello"}', "expected a list of messages, found a string"),
    "null content": (said(USER, {"role": "assistant", "content": None}), "expected content or tool_calls"),
    "empty answer": (said(USER, {"role": "assistant", "content": "  "}), "expected the assistant to say something"),
    "empty response": (b'{"prompt": "a", "response": ""}', "response: expected some text, found an empty string"),
    "image": (
        said({"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": "x"}]}),
        "expected parts of text only, found 'image_url'",
    ),
    "half a pair at the end": (b'{"text": "\\ud83d"}', r"no JSON: half a surrogate pair, \ud83d"),
    "half a pair": (b'{"text": "a \\ud83d b"}', r"no JSON: half a surrogate pair, \ud83d"),
    "half a pair in arguments": (
        said(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ud83d"}'}}]}),
        r"arguments of a tool call are no JSON: half a surrogate pair, \ud83d",
    ),
    "NaN": (b'{"text": "a", "score": NaN}', "no JSON: NaN is no JSON number"),
    "Infinity": (b'{"text": "a", "score": -Infinity}', "no JSON: -Infinity is no JSON number"),
    "out of range": (b'{"text": "a", "score": 1e999}', "no JSON: a number that is out of range"),
    "invalid UTF-8": (b'{"text": "\xff\xfe"}', "no JSON: invalid UTF-8, byte 0xff at place 11"),
    "NUL": (b'{"text": "a\0b"}', "no JSON: invalid control character at character 12"),
    "only NUL": (b"\0" * 20, "no JSON: expecting value at character 1"),
    "cut off": (b'{"text": "a', "no JSON: unterminated string"),
    "two values": (b'{"text": "a"} {"text": "b"}', "no JSON: extra data at character 15"),
    "deep": (b'{"text": ' + b"[" * 3000 + b"]" * 3000 + b"}", "nested too deep"),
    "deep tools": (
        b'{"messages": [{"role": "user", "content": "x"}], "tools": [' + b'{"a": ' * 100 + b"1" + b"}" * 100 + b"]}",
        "tools: nested deeper than 64",
    ),
    "a number": (b"7", "expected a JSON object, found a number"),
    "a list": (b"[1, 2]", "expected a JSON object, found a list"),
    "null": (b"null", "expected a JSON object, found null"),
    "other keys": (b'{"body": "x"}', "expected one of the keys"),
    "ids as text": (b'{"input_ids": "1 2 3"}', "input_ids: expected a list of token ids, found a string"),
    "huge ids": (b'{"input_ids": [1, 99999999999999999999]}', "input_ids: expected token ids"),
    "nested ids": (b'{"input_ids": [[1], [2]]}', "input_ids: expected token ids"),
    "thought of parts": (
        said(USER, {**ANSWER, "reasoning": ["a"]}), "expected reasoning to be a string, found a list",
    ),
    "arguments that are a list": (
        said(USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}),
        "expected arguments of a tool call to be an object, found a list",
    ),
    "a call without a name": (
        said(USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}), "to name its function",
    ),
    "no tools": (b'{"messages": [{"role": "user", "content": "x"}], "tools": [3]}', "tools[0]: expected a tool"),
    "broken tools": (b'{"messages": [{"role": "user", "content": "x"}], "tools": "[{"}', "tools: no JSON"),
}  # fmt: skip


@pytest.fixture
def chatty(tokenizer):
    """The tokenizer with a ChatML template."""
    tokenizer.chat_template = templates.CHATML
    yield tokenizer
    tokenizer.chat_template = None


def outcome(spec, tokenizer):
    """Lease every prompt; return where those that were captured stood, and what was rejected."""
    rejections = []
    source = PromptSource.from_spec(spec, tokenizer, group=8, on_reject=rejections.append)
    captured = []
    while (batch := source.lease("w")) is not None:
        captured += [task.source for task in batch.tasks if task.ordinal in batch.leases]
        for lease in batch.leases.values():
            source.complete(lease)
    assert source.drained
    source.close()
    return captured, rejections


def with_bad(path: Path, *rows: bytes, good: int = 40) -> Path:
    lines = [json.dumps(record).encode() for record in conversations(good)]
    path.write_bytes(b"\n".join([*lines[: good // 2], *rows, *lines[good // 2 :]]) + b"\n")
    return path


@pytest.mark.parametrize("name", BAD)
def test_a_broken_record_is_rejected_with_its_line_and_the_others_are_trained_on(tmp_path, chatty, name):
    row, reason = BAD[name]
    spec = spec_of(with_bad(tmp_path / "p.jsonl", row), evaluation={"prompts": 0})
    facts = validate_prompts(spec, chatty)
    assert (facts.rows, facts.total, facts.bad) == (41, 41, 1)
    captured, [rejection] = outcome(spec, chatty)
    assert len(captured) == 40
    assert (rejection.source, rejection.kind) == ("p.jsonl:21", "rejected")
    assert rejection.reason.startswith(reason) or reason in rejection.reason


@pytest.mark.parametrize("name", BAD)
def test_a_broken_record_ends_the_run_before_it_starts_where_that_is_wanted(tmp_path, chatty, name):
    path = with_bad(tmp_path / "p.jsonl", BAD[name][0])
    with pytest.raises(PromptError, match=r"p\.jsonl, line 21: "):
        validate_prompts(spec_of(path, data={"on_bad_record": "fail"}), chatty)


def test_a_file_with_some_of_every_kind_adds_up(tmp_path, chatty):
    path = with_bad(tmp_path / "p.jsonl", *(row for row, _ in BAD.values()), b" " * 20, b"\t", good=200)
    spec = spec_of(path, evaluation={"prompts": 8})
    facts = validate_prompts(spec, chatty)
    assert facts.bad == len(BAD)
    assert facts.rows == 200 + len(BAD)
    captured, rejections = outcome(spec, chatty)
    assert len(captured) + len(rejections) == facts.total
    assert {int(rejection.source.split(":")[1]) for rejection in rejections} <= set(range(101, 101 + len(BAD)))


def test_too_many_of_them_are_refused_with_reasons_and_lines(tmp_path, chatty):
    path = with_bad(tmp_path / "p.jsonl", *[BAD["NaN"][0]] * 8, *[BAD["deep"][0]] * 3)
    with pytest.raises(PromptError) as caught:
        validate_prompts(spec_of(path), chatty)
    assert str(caught.value).startswith(
        f"{path}: 11 of 51 records cannot be used, data.max_bad_records allows 20.0%: 8 x"
    )
    assert "(line 21, line 22, line 23, line 24, line 25, …); 3 x" in str(caught.value)
    assert validate_prompts(spec_of(path, data={"max_bad_records": 0.25}), chatty).bad == 11


def test_a_first_line_is_line_1(tmp_path, chatty):
    path = write(tmp_path / "p.jsonl", [{"body": n} for n in range(5000)])
    for setting in ("reject", "fail"):
        with pytest.raises(PromptError, match=r"line 1[,:]"):
            validate_prompts(spec_of(path, data={"on_bad_record": setting}), chatty)


def test_bad_records_of_a_holdout_file_are_left_out(tmp_path, chatty):
    path = write(tmp_path / "p.jsonl", conversations(40))
    holdout = write(tmp_path / "h.jsonl", [*conversations(60)[40:], {"prompt": None}])
    assert validate_prompts(spec_of(path, data={"holdout": str(holdout)}), chatty).held_out == 20
    with pytest.raises(PromptError, match=r"h\.jsonl, line 21: prompt: expected a string, found null"):
        validate_prompts(spec_of(path, data={"holdout": str(holdout), "on_bad_record": "fail"}), chatty)


@pytest.mark.parametrize("setting", ["reject", "fail"])
def test_rows_of_a_stream_that_nobody_looked_at_are_counted_as_well(tmp_path, chatty, setting):
    rows = [*conversations(300), *({"messages": []} for _ in range(200))]
    write(tmp_path / "train.jsonl", rows)
    spec = spec_of(f"hf:{tmp_path}", evaluation={"prompts": 0}, data={"on_bad_record": setting, "shuffle": False})
    assert validate_prompts(spec, chatty).bad == 0
    pool = EncodedPrompts(spec, chatty)
    with pytest.raises(PromptError, match="empty conversation") as caught:
        list(map(pool.task, range(500)))
    assert ("76 of 376 records" in str(caught.value)) == (setting == "reject")


def test_reasons_are_counted_whatever_numbers_and_names_are_in_them():
    refused = Refusals()
    for number in range(9):
        refused.add(f"p.jsonl:{number}", f"expected at most 64 tokens (data.max_tokens), found {number}")
    refused.add("p.parquet:row 3", "unknown role 'narrator'")
    assert refused.count == 10
    assert refused.describe() == (
        "9 x expected at most 64 tokens (data.max_tokens), found 0 (line 0, line 1, line 2, line 3, line 4, …); "
        "1 x unknown role 'narrator' (row 3)"
    )
    lengths = [f"expected at most 64 tokens (data.max_tokens), found {number}" for number in range(70, 88)]
    assert count_reasons([*lengths, "no JSON", "no JSON"]) == {
        "expected at most … tokens (data.max_tokens), found …": 18,
        "no JSON": 2,
    }
