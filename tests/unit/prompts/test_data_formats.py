"""The formats that people keep prompts in: shapes of records, kinds of files, names of keys."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from disagg_core.errors import PromptError
from disagg_core.prompts import files
from disagg_core.prompts.checks import validate_prompts
from disagg_core.prompts.files import JsonlFile
from disagg_core.prompts.json_values import RecordError
from disagg_core.prompts.pinned import DataChanged
from disagg_core.prompts.pool import EncodedPrompts
from disagg_core.prompts.record_files import open_records
from disagg_core.prompts.records import parse_record, questions_of
from disagg_core.prompts.shapes import Conversation, PlainText, PromptResponse, Tokenized, prompt_key, record_key
from disagg_core.run_spec.data import DataSection
from tests.unit.prompts.test_prompts import spec_of

pytestmark = pytest.mark.unit


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def messages_of(record, fields=None):
    found = parse_record(record, "auto", fields)
    assert isinstance(found, Conversation)
    return found.messages


# --- shapes of records ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "prompt", "response"),
    [
        ({"instruction": "add", "input": "1 and 1", "output": "2"}, "add\n\n1 and 1", "2"),
        ({"instruction": "hello", "input": "", "output": "hi"}, "hello", "hi"),
        ({"instruction": "hello", "response": "hi"}, "hello", "hi"),
        ({"instruction": "a", "output": "b", "text": "all of it"}, "a", "b"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a", "b"),
        ({"prompt": "a", "completion": "b", "label": True}, "a", "b"),
    ],
)
def test_pairs(record, prompt, response):
    assert parse_record(record, "auto") == PromptResponse(prompt, response)


def test_alpaca_with_a_system_prompt_and_a_history_is_a_conversation():
    record = {"instruction": "c", "input": "", "output": "d", "system": "S", "history": [["a", "b"]]}
    assert messages_of(record) == [
        {"role": "system", "content": "S"}, user("a"), assistant("b"), user("c"), assistant("d"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [user("q")], "completion": [assistant("a")]},
        {"prompt": [user("q")], "completion": "a"},
        {"prompt": "q", "completion": [assistant("a")]},
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"messages": json.dumps([user("q"), assistant("a")])},
        {"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversation": [{"from": "User", "value": "q"}, {"from": " Bard ", "value": "a"}]},
        {"conversations": [user(["q"]), {"role": "bing", "content": [{"type": "text", "text": "a"}]}]},
        {"messages": None, "prompt": [user("q")], "completion": [assistant("a")], "text": None},
    ],
)
def test_conversations(record):
    assert messages_of(record) == [user("q"), assistant("a")]


def test_prompts_alone_are_kept_for_the_target_to_continue():
    assert messages_of({"prompt": [user("q")]}) == [user("q")]
    assert messages_of({"question_id": 1, "category": "math", "turns": ["q", "and then?"]}) == [user("q")]
    assert questions_of({"turns": ["q", "and then?"]}) == ["q", "and then?"]


@pytest.mark.parametrize(
    ("role", "known"),
    [
        ("human", "user"), ("User", "user"), ("prompter", "user"), ("gpt", "assistant"), ("bing", "assistant"),
        ("bard", "assistant"), ("ChatGPT", "assistant"), ("model", "assistant"), ("ipython", "tool"),
        ("observation", "tool"), ("function", "tool"), ("SYSTEM", "system"), ("developer", "developer"),
    ],
)  # fmt: skip
def test_roles_by_other_names(role, known):
    assert messages_of({"messages": [{"role": role, "content": "x"}]})[0]["role"] == known


def test_keys_by_other_names():
    fields = {"prompt": "question", "response": "answer"}
    record = {"question": "q", "answer": "a", "text": "not this", "messages": "nor this"}
    assert parse_record(record, "auto", fields) == PromptResponse("q", "a")
    turns = {"dialog": [{"speaker": "human", "words": "q"}, {"speaker": "gpt", "words": "a"}], "sys": "S"}
    named = {"messages": "dialog", "role": "speaker", "content": "words", "system": "sys"}
    assert messages_of(turns, named) == [{"role": "system", "content": "S"}, user("q"), assistant("a")]
    assert parse_record({"ids": [1, 2], "keep": [0, 1]}, "auto", {"input_ids": "ids", "loss_mask": "keep"}) == (
        Tokenized([1, 2], [0, 1])
    )
    with pytest.raises(RecordError, match=r"expected the key 'question' \(data\.fields\.prompt\); found answer"):
        parse_record({"answer": "a"}, "auto", fields)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_in_a_field_of_its_own_is_kept(name):
    assert messages_of({"messages": [user("q"), assistant("a", **{name: "well"})]})[1]["reasoning_content"] == "well"


def test_calls_and_tools_in_any_form_are_openais():
    tool = {"name": "add", "parameters": {}}
    calls = [
        {"tool_calls": [{"id": "1", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]},
        {"tool_calls": json.dumps([{"id": "1", "name": "add", "arguments": {"a": 1}}])},
    ]
    for call in calls:
        for tools in ([tool], json.dumps([tool]), [json.dumps(tool)], [{"type": "function", "function": tool}]):
            found = parse_record({"messages": [user("q"), {"role": "assistant", **call}], "tools": tools}, "auto")
            assert found.messages[1]["tool_calls"] == [
                {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
            ]
            assert found.tools == [{"type": "function", "function": tool}]
    old = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}}
    assert parse_record({"messages": [user("q"), old]}, "auto").tool_call_turns == {1}


def test_records_are_told_apart_by_what_their_template_is_given_and_by_their_masks():
    plain = {"messages": [user("q"), assistant("a")]}
    thinking = {**plain, "chat_template_kwargs": {"enable_thinking": False}}
    assert prompt_key(parse_record(plain, "auto")) != prompt_key(parse_record(thinking, "auto"))
    one, other = ({"input_ids": [1, 2, 3], "loss_mask": mask} for mask in ([0, 0, 1], [0, 1, 1]))
    assert record_key(parse_record(one, "auto")) != record_key(parse_record(other, "auto"))
    assert record_key(parse_record(one, "auto")) == record_key(parse_record(dict(one), "auto"))


# --- kinds of files ---------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f'say "{n}",\nplease', "response": f"ünd {n}", "score": n / 2} for n in range(40)]


def as_jsonl(path: Path, rows=ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_csv(path: Path, rows=ROWS, **how) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **how)
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_parquet(path: Path, rows=ROWS) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    return path


def written(folder: Path, kind: str) -> Path:
    """Write ROWS as a file of `kind` in `folder`."""
    path = folder / f"rows.{kind.removesuffix('+').split('.')[0]}"
    match kind.split(".")[0]:
        case "jsonl":
            as_jsonl(path)
        case "json":
            path.write_text(json.dumps(ROWS, indent=1))
        case "json+":
            path.write_text(json.dumps(ROWS))
        case "csv":
            as_csv(path)
        case "tsv":
            as_csv(path, delimiter="\t")
        case "parquet":
            as_parquet(path)
    raw = path.read_bytes()
    match kind.partition(".")[2]:
        case "gz":
            half = len(raw) // 2
            packed = gzip.compress(raw[:half]) + gzip.compress(raw[half:])
        case "zst":
            packed = pa.compress(raw, codec="zstd", asbytes=True)
        case "bz2":
            packed = bz2.compress(raw)
        case _:
            return path
    path.unlink()
    path = path.with_name(f"{path.name}.{kind.partition('.')[2]}")
    path.write_bytes(packed)
    return path


KINDS = ["jsonl", "json", "json+", "csv", "tsv", "parquet", "jsonl.gz", "jsonl.zst", "jsonl.bz2", "json.gz", "csv.zst",
         "parquet.gz"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_read_by_position(tmp_path, kind):
    file = open_records(written(tmp_path, kind), DataSection(prompts="x"))
    assert len(file) == 40
    for index in (39, 0, 17, 8, 7):
        row = file.read(index)
        assert (row["prompt"], row["response"]) == (ROWS[index]["prompt"], ROWS[index]["response"])
        assert file.where(index).startswith("rows.")
    file.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_the_same_in_every_kind_of_file_and_what_was_planned_is_what_is_read(tmp_path, tokenizer, kind):
    tokenizer.chat_template = None
    path = written(tmp_path, kind)
    spec = spec_of(path, evaluation={"prompts": 4}, data={"epochs": 2})
    facts = validate_prompts(spec, tokenizer)
    assert (facts.rows, facts.count, facts.bad) == (40, 36, 0)
    (tmp_path / "plain").mkdir()
    plain = spec_of(as_jsonl(tmp_path / "plain" / "rows.jsonl"), evaluation={"prompts": 4}, data={"epochs": 2})
    with_pin, without = EncodedPrompts(spec, tokenizer, facts.data), EncodedPrompts(plain, tokenizer)
    assert [with_pin.task(n).input_ids for n in range(72)] == [without.task(n).input_ids for n in range(72)]
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataChanged):
        EncodedPrompts(spec, tokenizer, facts.data)


def test_what_is_appended_to_a_compressed_file_is_a_change(tmp_path):
    path = written(tmp_path, "jsonl.gz")
    pin = open_records(path, DataSection(prompts="x")).pin
    path.write_bytes(path.read_bytes() + gzip.compress(b'{"prompt": "more"}\n'))
    assert len(open_records(path, DataSection(prompts="x"))) == 41
    with pytest.raises(DataChanged):
        open_records(path, DataSection(prompts="x"), pin)


def test_a_folder_is_all_its_files_by_name(tmp_path):
    (tmp_path / "b").mkdir()
    as_csv(tmp_path / "b" / "2.csv", ROWS[20:])
    as_jsonl(tmp_path / "1.jsonl", ROWS[:20])
    (tmp_path / "README.md").write_text("about")
    file = open_records(tmp_path, DataSection(prompts="x"))
    assert [file.read(index)["response"] for index in range(40)] == [row["response"] for row in ROWS]
    assert file.where(0) == "1.jsonl:1"
    open_records(tmp_path, DataSection(prompts="x"), file.pin).close()
    as_jsonl(tmp_path / "3.jsonl", ROWS)
    with pytest.raises(DataChanged):
        open_records(tmp_path, DataSection(prompts="x"), file.pin)


def test_places_are_lines_rows_and_records(tmp_path):
    assert open_records(written(tmp_path, "csv"), DataSection(prompts="x")).where(1) == "rows.csv:4"
    assert open_records(written(tmp_path, "parquet"), DataSection(prompts="x")).where(1) == "rows.parquet:row 2"
    assert open_records(written(tmp_path, "json"), DataSection(prompts="x")).where(1) == "rows.json:record 2 (line 7)"


def test_tables_hold_conversations_too(tmp_path):
    rows = [{"messages": [user(f"q {n}"), assistant("a")], "tools": None, "image": b"\0" * 100} for n in range(9)]
    parquet = open_records(as_parquet(tmp_path / "c.parquet", rows), DataSection(prompts="x"))
    assert messages_of(parquet.read(8)) == [user("q 8"), assistant("a")]
    assert "image" not in parquet.read(8), "columns that nobody reads are not kept"
    cells = [{"messages": json.dumps(row["messages"]), "tools": ""} for row in rows]
    table = open_records(as_csv(tmp_path / "c.csv", cells), DataSection(prompts="x"))
    assert messages_of(table.read(8)) == [user("q 8"), assistant("a")]


def test_lines_are_indexed_over_the_borders_of_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK_BYTES", 16)
    path = tmp_path / "p.jsonl"
    lines = [
        '{"text": "a"}',
        " " * 40,
        "",
        '{"text": "a line that is longer than a chunk"}',
        "\t\r",
        '  {"text": "c"}\r',
    ]
    for end in ("", "\n"):
        path.write_text("\n".join(lines) + end)
        file = JsonlFile(path)
        assert [file.read(index)["text"][0] for index in range(len(file))] == ["a", "a", "c"]
        assert [file.where(index) for index in range(3)] == ["p.jsonl:1", "p.jsonl:4", "p.jsonl:6"]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("p.jsonl", b"\x00\x01\x02" * 100, "found a binary file"),
        ("p.csv", b"\xff\xfea\x00,\x00", "found text in UTF-16"),
        ("p.parquet", b"PAR1 no more PAR1", "found a damaged one"),
        ("p.xlsx", b"PK\x03\x04rest", "found a zip archive or an Excel sheet"),
        ("p.json", b'{\n "data": [\n {"prompt": "a"}\n ]\n}\n', "found one JSON object over several lines"),
        ("p.json", b'[{"prompt": "a"}, {"prompt"', "found one that does not end with the file"),
        ("p.json", b"[ ]", "found an empty list"),
        ("p.csv", b"how are you?,fine\nand you?,fine too\n", r"reads 'how are you\?', 'fine': .*prompt,response above"),
        ("p.csv", b"prompt,response\n", "expected a header line and at least one record"),
        ("p.csv", b"prompt,prompt\na,b\n", "found prompt twice"),
        ("p.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000, mtime=0)[:-20], "cannot be unpacked as gzip"),
        ("p.jsonl", b"", "found an empty file"),
        ("p.jsonl", b" " * 100 + b"\n\t\n", "found an empty file"),
    ],
)
def test_what_is_no_file_of_prompts_is_said(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=what) as caught:
        validate_prompts(spec_of(tmp_path / name))
    assert name in str(caught.value)


def test_a_folder_without_prompts_is_named(tmp_path):
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(PromptError, match="found a folder without any"):
        validate_prompts(spec_of(tmp_path))


def test_real_keys_of_a_data_set_are_mapped_in_the_run_document(tmp_path, tokenizer):
    path = as_jsonl(tmp_path / "p.jsonl", [{"question": f"question {n}", "answer": f"answer {n}"} for n in range(20)])
    with pytest.raises(
        PromptError, match=r"20 of 20 .*data\.fields: \{prompt: question, response: answer\} \(line 1, "
    ):
        validate_prompts(spec_of(path))
    fields = {"prompt": "question", "response": "answer"}
    assert validate_prompts(spec_of(path, data={"fields": fields})).bad == 0
    assert PlainText("a") == parse_record({"body": "a"}, "auto", {"text": "body"})
