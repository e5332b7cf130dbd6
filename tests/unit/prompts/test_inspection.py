"""``draftline data inspect``: what is said of prompts before any run."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.console import Console

from disagg_core.cli.data import render
from disagg_core.prompts.encode import PromptEncoder
from disagg_core.prompts.inspection import inspect_prompts, masked_text
from disagg_core.prompts.records import parse_record
from flows.cli import app as cli
from tests.unit.prompts import templates
from tests.unit.prompts.test_bad_records import BAD, with_bad
from tests.unit.prompts.test_prompts import conversations, spec_of, write

pytestmark = pytest.mark.unit


@pytest.fixture
def chatty(tokenizer):
    """The tokenizer with a ChatML template."""
    tokenizer.chat_template = templates.CHATML
    yield tokenizer
    tokenizer.chat_template = None


@pytest.fixture
def draftline(monkeypatch, capsys):
    """Run the command; return its exit status, output and errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["draftline", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run


def test_counts_add_up(tmp_path, chatty):
    path = with_bad(tmp_path / "p.jsonl", *(row for row, _ in BAD.values()), b'{"text": "hello there"}')
    with path.open("a") as file:
        file.write(json.dumps(conversations(1)[0]) + "\n")
        file.write(json.dumps({"prompt": "question 1", "response": "another answer"}) + "\n")
        file.write(json.dumps({"prompt": "question alone"}) + "\n")
        file.write(json.dumps({"prompt": "a " * 50, "response": "b"}) + "\n")
    found = inspect_prompts(spec_of(path), chatty)
    assert (found.records, found.usable, found.bad.count) == (45 + len(BAD), 45, len(BAD))
    assert found.formats == {"messages": 41, "text": 1, "prompt_response": 3}
    assert (found.copies, found.same_questions) == (1, 2)
    assert found.encoded == 45 == len(found.tokens) + found.refused.count
    assert {reason.example.split(";")[0] for reason in found.refused.reasons.values()} == {
        "no response to train on after the prompt 'question alone'",
        "no position to train on: the loss mask is zero after truncation to data.max_tokens",
    }
    assert found.refused.count == 2
    assert found.tokens == sorted(found.tokens)
    assert found.sample_source == "p.jsonl:1"


def test_the_sample_shows_what_is_trained_on(tmp_path, chatty):
    found = inspect_prompts(spec_of(write(tmp_path / "p.jsonl", conversations(3))), chatty)
    assert "".join(piece for piece, _ in found.sample) == chatty.decode(
        chatty(chatty.apply_chat_template(conversations(1)[0]["messages"], tokenize=False))["input_ids"]
    )
    [live] = [piece for piece, trained in found.sample if trained]
    assert live.replace(" ", "") == "answer0<|im_end|>"
    coloured = Console(force_terminal=True, record=True, file=io.StringIO(), width=200)
    for part in render(found, spec_of("p"), colour=True):
        coloured.print(part)
    assert "⟦" not in coloured.export_text()


def test_of_a_long_file_some_records_are_encoded_and_all_are_looked_at(tmp_path, chatty):
    path = write(tmp_path / "p.jsonl", [*conversations(99), {"prompt": 1}])
    found = inspect_prompts(spec_of(path), chatty, most_encoded=10)
    assert (found.records, found.bad.count, found.encoded) == (100, 1, 10)


def test_the_command_shows_what_a_run_would_do(tmp_path, chatty, draftline):
    chatty.save_pretrained(tmp_path / "target")
    path = with_bad(tmp_path / "p.jsonl", BAD["NaN"][0], *[BAD["image"][0]] * 2)
    status, out, err = draftline("data", "inspect", path, "--tokenizer", tmp_path / "target")
    assert (status, err) == (0, "")
    assert "43 = 40 usable + 3 bad" in out
    assert "no JSON: NaN is no JSON number" in out
    assert "line 22, line 23" in out
    assert "⟦answer0<|im_end|>⟧" in out.replace(" ", "")
    assert "a run would refuse" not in out
    status, out, _ = draftline("data", "inspect", path, "--set", "data.on_bad_record=fail")
    assert (status, "a run would refuse these prompts (data.on_bad_record: fail)" in out) == (0, True)


def test_the_command_takes_a_run_document(tmp_path, chatty, draftline):
    chatty.save_pretrained(tmp_path / "target")
    path = write(tmp_path / "p.jsonl", [{"q": "question", "a": "answer"}])
    run = tmp_path / "run.yaml"
    run.write_text("target: {model: ./target}\ndata: {prompts: other.jsonl, fields: {prompt: q, response: a}}\n")
    status, out, _ = draftline("data", "inspect", path, "--run", run)
    assert (status, "1 = 1 usable + 0 bad" in out, "1 = 1 trained on" in out) == (0, True, True)


@pytest.mark.parametrize(
    ("content", "arguments", "complaint"),
    [
        (None, (), "no such file"),
        (b"\x89PNG\x00\x00", (), "found a binary file"),
        (b"hello\nthere\n", (), "none of 2 records can be used: 2 x no JSON: expecting value at character 1 (line 1, "),
        (b'{"q": 1}\n', (), "found q; say which is which with data.fields"),
        (b'{"text": "a"}\n', ("--set", "data.fields=3"), "data.fields"),
        (b'{"text": "a"}\n', ("--set", "data.fields={sound: a}"), "data.fields"),
        (b'{"text": "a"}\n', ("--target", "./nothing"), "no such directory"),
        (b'{"text": "a"}\n', ("--run", "nothing.yaml"), "no such run document"),
    ],
)
def test_rubbish_is_one_message_and_exit_2(tmp_path, draftline, content, arguments, complaint):
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_bytes(content)
    status, out, err = draftline("data", "inspect", path, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert complaint in err


def test_pieces_of_a_sample_are_the_whole_text(chatty):
    spec = spec_of("p", data={"max_tokens": 4096})
    turns = [message for record in conversations(4) for message in record["messages"]]
    encoded = PromptEncoder(spec, chatty).encode(parse_record({"messages": turns}, "auto"))
    pieces = masked_text(chatty, encoded)
    assert "".join(piece for piece, _ in pieces) == chatty.decode(encoded.input_ids)
    assert [trained for _, trained in pieces] == [False, True] * 4 + [False]
