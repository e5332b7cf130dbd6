"""Prompts: formats, files, encoding, hold-out, order, and what is said about bad input."""

from __future__ import annotations

import http.client
import json
import os
import resource
from pathlib import Path

import aiohttp
import httpx
import pytest
import requests
import urllib3
from huggingface_hub.errors import HfHubHTTPError
from pydantic import ValidationError

from disagg_core.contracts import PromptTask
from disagg_core.errors import PromptError, PromptRejected
from disagg_core.ordinals import OrdinalSet
from disagg_core.prompts import files
from disagg_core.prompts.checks import heldout_prompts, validate_prompts
from disagg_core.prompts.content import BLOCK_BYTES
from disagg_core.prompts.encode import PromptEncoder
from disagg_core.prompts.files import DatasetName, DatasetStream, JsonlFile
from disagg_core.prompts.json_values import RecordError
from disagg_core.prompts.pinned import DataChanged
from disagg_core.prompts.pool import EncodedPrompts
from disagg_core.prompts.records import parse_record
from disagg_core.prompts.shapes import Conversation, PlainText, PromptResponse, Tokenized, prompt_key
from disagg_core.rollout.prompt_source import PromptSource
from disagg_core.run_spec.document import RunSpec
from disagg_core.target.facts import read_target_facts
from disagg_core.target.tokenizer import template_text, tokenizer_version
from tests.unit.prompts import templates

pytestmark = pytest.mark.unit

DEMO_TARGET = Path(__file__).resolve().parents[3] / "infra" / "demo" / "target"


@pytest.fixture
def chatty(tokenizer, tmp_path):
    """The tokenizer with a ChatML template."""
    tokenizer.chat_template = templates.CHATML
    yield tokenizer
    tokenizer.chat_template = None


def spec_of(prompts, **sections):
    document = {"target": {"model": "./target"}, "data": {"prompts": str(prompts), "max_tokens": 64}}
    for name, section in sections.items():
        document[name] = {**document.get(name, {}), **section}
    return RunSpec.model_validate(document)


def write(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def conversations(count):
    return [
        {"messages": [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]}
        for n in range(count)
    ]


# --- formats ---------------------------------------------------------------------------------------------------------


def test_formats_are_told_by_their_keys():
    sharegpt = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "system": "S"}
    found = parse_record(sharegpt, "auto")
    assert found == Conversation(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    )
    assert parse_record({"prompt": "a", "completion": "b"}, "auto") == PromptResponse("a", "b")
    assert parse_record({"prompt": "a"}, "auto") == PromptResponse("a", None)
    assert parse_record({"text": "t"}, "auto") == PlainText("t")
    assert parse_record({"input_ids": [1, 2]}, "auto") == Tokenized([1, 2], [1, 1])


def test_parts_and_calls_of_messages_are_made_plain():
    found = parse_record(
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
            ]
        },
        "auto",
    )
    assert found.messages[0]["content"] == "ab"
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert found.tool_call_turns == {1}


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ([1], "expected a JSON object, found a list"),
        ({"other": 1}, "expected one of the keys input_ids, messages, .*, text; found other; say which"),
        ({"question": "a", "answer": "b"}, "data.fields: {prompt: question, response: answer}"),
        ({"messages": []}, "empty conversation"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "unknown role 'narrator'"),
        ({"messages": [{"role": "user"}]}, "expected content or tool_calls, found neither"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "found 'image_url'"),
        ({"text": "  "}, "found an empty string"),
        ({"prompt": 3}, "prompt: expected a string, found a number"),
        ({"input_ids": [1, -1]}, "0 and above"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "expected 2 numbers"),
        ({"input_ids": [1, 2], "loss_mask": [1, 7]}, "0 and 1 only"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(record, what):
    with pytest.raises(RecordError, match=what.replace("(", r"\(")):
        parse_record(record, "auto")


def test_equal_questions_have_equal_keys():
    one, two = conversations(2)
    key = prompt_key(parse_record(one, "auto"))
    other_answer = {"messages": [one["messages"][0], {"role": "assistant", "content": "else"}]}
    assert key == prompt_key(parse_record(other_answer, "auto"))
    assert key == prompt_key(parse_record({"prompt": "question 0", "response": "x"}, "auto"))
    assert key != prompt_key(parse_record(two, "auto"))


# --- files -----------------------------------------------------------------------------------------------------------


def test_lines_are_found_by_position_and_named_as_an_editor_counts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n   \n{"text": "b"}\r\n{"text": "c"}')
    file = JsonlFile(path)
    assert [file.read(index)["text"] for index in range(len(file))] == ["a", "b", "c"]
    assert [file.where(index) for index in range(3)] == ["prompts.jsonl:1", "prompts.jsonl:4", "prompts.jsonl:5"]


def test_a_broken_line_is_named_before_anything_starts(tmp_path):
    path = write(tmp_path / "p.jsonl", conversations(40))
    with path.open("a") as file:
        file.write('\n{"messages": [\n')
    assert validate_prompts(spec_of(path)).bad == 1
    with pytest.raises(PromptError, match=r"p\.jsonl, line 42: no JSON"):
        validate_prompts(spec_of(path, data={"on_bad_record": "fail"}))


@pytest.mark.parametrize(
    ("content", "what"), [(None, "no such file"), ("\n\n", "expected at least one prompt, found an empty file")]
)
def test_missing_and_empty_files_are_named(tmp_path, content, what):
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PromptError, match=what):
        validate_prompts(spec_of(path))


def test_a_dataset_directory_is_streamed_in_a_seeded_order(tmp_path, chatty):
    write(tmp_path / "train.jsonl", conversations(60))
    spec = spec_of(f"hf:{tmp_path}", evaluation={"prompts": 5}, data={"epochs": 2})
    facts = validate_prompts(spec, chatty)
    assert facts.held_out == 5

    def sources(skip):
        source = PromptSource.from_spec(spec, chatty, group=8, skip=skip)
        found = []
        while (batch := source.lease("w")) is not None:
            found += [task for task in batch.tasks if task.ordinal in batch.leases]
            for lease in batch.leases.values():
                source.complete(lease)
        assert source.drained
        return found

    whole = sources(None)
    assert [task.ordinal for task in whole] == list(range(110))
    first, second = ([tuple(task.input_ids) for task in part] for part in (whole[:55], whole[55:]))
    assert sorted(first) == sorted(second)
    assert first != second
    resumed = sources(OrdinalSet([(0, 70)]))
    assert [task.input_ids for task in resumed] == [task.input_ids for task in whole[71:]]


def test_a_missing_split_is_named(tmp_path):
    write(tmp_path / "train.jsonl", conversations(3))
    with pytest.raises(PromptError, match="split 'test'"):
        validate_prompts(spec_of(f"hf:{tmp_path}:test"))


# --- encoding --------------------------------------------------------------------------------------------------------


def encoder(tokenizer, **data):
    return PromptEncoder(spec_of("p.jsonl", data=data), tokenizer)


def live(tokenizer, encoded):
    return tokenizer.decode([t for t, m in zip(encoded.input_ids, encoded.loss_mask, strict=True) if m])


def test_a_conversation_is_truncated_on_the_right_or_rejected(chatty):
    record = parse_record({"prompt": "question", "response": "answer " * 60}, "auto")
    encoded = encoder(chatty).encode(record)
    assert len(encoded.input_ids) == len(encoded.loss_mask) == 64
    with pytest.raises(PromptRejected, match=r"at most 64 tokens \(data.max_tokens\), found"):
        encoder(chatty, truncation="reject").encode(record)


def test_a_sample_without_a_live_position_is_rejected(chatty):
    record = parse_record({"prompt": "question " * 60, "response": "answer"}, "auto")
    with pytest.raises(PromptRejected, match="no position to train on"):
        encoder(chatty).encode(record)


def test_without_a_template_pairs_are_running_text_and_conversations_are_refused(tokenizer):
    tokenizer.chat_template = None
    encoded = encoder(tokenizer).encode(parse_record({"prompt": "question", "response": "answer"}, "auto"))
    assert live(tokenizer, encoded).replace(" ", "") == "answer</s>"
    with pytest.raises(PromptError, match="no chat template; name a Jinja file"):
        encoder(tokenizer).encode(parse_record(conversations(1)[0], "auto"))


def test_an_own_template_replaces_the_tokenizers(chatty, tmp_path):
    (tmp_path / "own.jinja").write_text(templates.GEMMA)
    own = encoder(chatty, chat_template=str(tmp_path / "own.jinja"))
    ids = own.encode(parse_record(conversations(1)[0], "auto")).input_ids
    assert chatty.decode(ids).startswith("<bos>")
    assert tokenizer_version(chatty, own.chat.source) != tokenizer_version(chatty, template_text(chatty, None))


def test_generation_starts_where_the_target_goes_on(chatty):
    several = parse_record(
        {"messages": [*conversations(1)[0]["messages"], *conversations(2)[1]["messages"]]}, "messages"
    )
    encoded = encoder(chatty, generate={"max_new_tokens": 8}).encode(several)
    text = "".join(chatty.convert_ids_to_tokens(encoded.input_ids))
    assert text.endswith("<|im_start|>assistant\n")
    assert "answer" in text, "earlier answers are part of the prompt"
    assert not any(encoded.loss_mask)
    with pytest.raises(PromptRejected, match="leaves nothing of"):
        encoder(chatty, generate={}).encode(parse_record({"text": "hello " * 99}, "auto"))


@pytest.mark.parametrize(
    "setting",
    [
        {"truncation": "reject"},
        {"loss_on": "last_assistant"},
        {"train_on_thinking": False},
        {"train_on_tool_calls": False},
    ],
)
def test_what_says_something_about_answers_is_refused_where_the_target_writes_them(setting):
    [name] = setting
    with pytest.raises(ValidationError, match=f"beside data.generate, found {name}: "):
        spec_of("prompts.jsonl", data={**setting, "generate": {}})
    stored = spec_of("prompts.jsonl", data={"generate": {}}).model_dump()
    assert RunSpec.model_validate(stored).data.generate is not None, "a stored document names the defaults, too"
    assert getattr(spec_of("prompts.jsonl", data=setting).data, name) == setting[name]


def test_token_ids_of_another_tokenizer_are_rejected(chatty):
    with pytest.raises(PromptRejected, match="token id 99999"):
        encoder(chatty).encode(parse_record({"input_ids": [1, 2, 99999]}, "auto"))


# --- hold-out and order ----------------------------------------------------------------------------------------------


def test_held_out_prompts_are_kept_out_of_training_in_every_epoch(tmp_path, chatty):
    path = write(tmp_path / "p.jsonl", conversations(40))
    spec = spec_of(path, evaluation={"prompts": 6}, data={"epochs": 2})
    facts = validate_prompts(spec, chatty)
    assert (facts.rows, facts.held_out, facts.count, facts.total) == (40, 6, 34, 68)
    held_out = {tuple(ids) for ids in heldout_prompts(spec, chatty, 6)}
    assert len(held_out) == 6
    pool = EncodedPrompts(spec, chatty)
    asked = [tuple(pool.encoder.encode_prompt(parse_record(pool.order.place(0, n).raw, "auto"))) for n in range(34)]
    assert not held_out & set(asked)
    assert len(set(asked)) == 34


def test_prompts_to_measure_on_in_training_are_held_out_besides_those_of_the_evaluation(tmp_path, chatty):
    path = write(tmp_path / "p.jsonl", conversations(40))
    spec = spec_of(path, evaluation={"prompts": 4}, training={"heldout": {"prompts": 5}})
    facts = validate_prompts(spec, chatty)
    assert (facts.held_out, facts.count) == (9, 31)
    few = write(tmp_path / "few.jsonl", conversations(3))
    with pytest.raises(PromptError, match=r"training\.heldout\.prompts: expected some held-out prompts"):
        validate_prompts(spec_of(few, evaluation={"prompts": 0}, training={"heldout": {"prompts": 5}}), chatty)


def test_a_prompt_that_asks_the_same_as_a_held_out_one_is_rejected(tmp_path, chatty):
    path = write(tmp_path / "p.jsonl", [*conversations(20), *conversations(20)])
    source = PromptSource.from_spec(spec_of(path, evaluation={"prompts": 4}), chatty)
    while (batch := source.lease("w")) is not None:
        for lease in batch.leases.values():
            source.complete(lease)
    assert source.rejected == 4


def test_a_given_holdout_must_not_be_among_the_prompts(tmp_path, chatty):
    path = write(tmp_path / "p.jsonl", conversations(20))
    good, bad = write(tmp_path / "good.jsonl", conversations(25)[20:]), write(tmp_path / "bad.jsonl", conversations(1))
    spec = spec_of(path, data={"holdout": str(good)})
    assert validate_prompts(spec, chatty).count == 20
    assert len(heldout_prompts(spec, chatty, 3)) == 3
    with pytest.raises(PromptError, match=r"p\.jsonl:1 asks the same as the held-out prompt at bad\.jsonl:1"):
        validate_prompts(spec_of(path, data={"holdout": str(bad)}), chatty)


def test_the_order_is_seeded_and_limited(tmp_path, chatty):
    path = write(tmp_path / "p.jsonl", conversations(50))

    def order(**sections):
        pool = EncodedPrompts(spec_of(path, evaluation={"prompts": 0}, **sections), chatty)
        return [pool.task(n).source for n in range(pool.end)]

    assert order() == order()
    assert order() != order(run={"seed": 1})
    assert order(data={"shuffle": False, "limit": 3}) == ["p.jsonl:1", "p.jsonl:2", "p.jsonl:3"]
    twice = order(data={"limit": 10, "epochs": 2})
    assert sorted(twice[:10]) == sorted(twice[10:])
    assert twice[:10] != twice[10:]


def test_an_unmaskable_template_is_named_before_anything_starts(tmp_path, chatty):
    chatty.chat_template = templates.SHUFFLING
    turns = conversations(2)[0]["messages"] + conversations(2)[1]["messages"]
    path = write(tmp_path / "p.jsonl", [{"messages": turns}] * 8)
    with pytest.raises(PromptError, match=r"p\.jsonl:\d+: the assistant turn at message 1 cannot be found"):
        validate_prompts(spec_of(path, evaluation={"prompts": 0}), chatty)


def test_prompts_that_are_all_unusable_are_named_before_anything_starts(tmp_path, chatty):
    path = write(tmp_path / "p.jsonl", [{"prompt": f"question {n}"} for n in range(8)])
    with pytest.raises(PromptError, match=r"none of the first \d+ prompts can be trained on; .*set data.generate"):
        validate_prompts(spec_of(path), chatty)
    assert validate_prompts(spec_of(path, data={"generate": {}}), chatty).count == 6


def test_tokenizer_versions_differ_by_vocabulary_and_template(chatty):
    version = tokenizer_version(chatty, "a")
    chatty("some text", truncation=True, max_length=4, padding="max_length") if chatty.pad_token else None
    assert version == tokenizer_version(chatty, "a")
    assert version != tokenizer_version(chatty, "b")


# --- leasing by groups -----------------------------------------------------------------------------------------------


def tasks(count):
    return [PromptTask(ordinal=n, source=str(n), input_ids=[1, 2, 3], loss_mask=[1, 1, 1]) for n in range(count)]


def test_a_group_is_whole_whatever_is_covered():
    source = PromptSource.of_tasks(tasks(10), group=4, skip=OrdinalSet([(0, 4)]))
    batch = source.lease("w")
    assert [task.ordinal for task in batch.tasks] == [4, 5, 6, 7]
    assert sorted(batch.leases) == [5, 6, 7]
    assert [task.ordinal for task in source.lease("w").tasks] == [8, 9]
    assert source.lease("w") is None
    assert not source.drained


def test_tasks_may_have_any_different_ordinals():
    some = [PromptTask(ordinal=n, source="", input_ids=[1], loss_mask=[1]) for n in (2, 7)]
    source = PromptSource.of_tasks(some, group=4)
    assert [sorted(source.lease("w").leases) for _ in range(2)] == [[2], [7]]
    with pytest.raises(ValueError, match="2 different ordinals"):
        PromptSource.of_tasks([some[0], some[0]])


def test_half_a_million_prompts_need_little_memory(tmp_path):
    path = tmp_path / "many.jsonl"
    line = json.dumps({"text": "hello there " * 4}) + "\n"
    with path.open("w") as file:
        for _ in range(50):
            file.write(line * 10_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file = JsonlFile(path)
    assert len(file) == 500_000
    assert file.read(499_999)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 100


# --- the data of a run stays what it was when the run was planned -----------------------------------------------------


def ordinals_by_source(spec, tokenizer, pinned):
    pool = EncodedPrompts(spec, tokenizer, pinned)
    found = [pool.task(ordinal).source for ordinal in range(pool.end)]
    pool.close()
    return found


def test_a_file_that_grew_is_read_up_to_where_it_was_pinned(tmp_path, chatty):
    path = write(tmp_path / "p.jsonl", conversations(50))
    spec = spec_of(path, evaluation={"prompts": 6}, data={"epochs": 2})
    planned = validate_prompts(spec, chatty)
    before = ordinals_by_source(spec, chatty, planned.data)
    with path.open("a") as file:
        file.write(json.dumps(conversations(51)[50]) + "\n")
    assert ordinals_by_source(spec, chatty, planned.data) == before
    again = validate_prompts(spec, chatty, pinned=planned.data)
    assert (again.total, again.data, again.evaluated) == (planned.total, planned.data, planned.evaluated)


@pytest.mark.parametrize("change", ["a line less", "another line", "two lines the other way round", "no end of line"])
def test_a_file_that_is_not_the_planned_one_is_refused(tmp_path, chatty, change):
    records = conversations(50)
    path = write(tmp_path / "p.jsonl", records)
    spec = spec_of(path)
    planned = validate_prompts(spec, chatty).data
    if change == "a line less":
        write(path, records[:-1])
    elif change == "another line":
        write(path, [*records[:-1], conversations(60)[59]])
    elif change == "two lines the other way round":
        write(path, [records[1], records[0], *records[2:]])
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        DataChanged, match=r"p\.jsonl: expected the \d+ bytes with SHA-256 .* start a new run"
    ) as caught:
        EncodedPrompts(spec, chatty, planned)
    assert caught.value.failure_class == "bad_input"


@pytest.mark.parametrize("change", ["edited", "cut", "emptied", "replaced", "touched", "appended to"])
def test_a_file_that_changes_while_it_is_read_is_noticed_at_the_next_read_of_the_place(tmp_path, chatty, change):
    records = conversations(2000)
    path = write(tmp_path / "p.jsonl", records)
    pool = EncodedPrompts(spec_of(path, evaluation={"prompts": 0}), chatty)
    ordinals = range(len(records))
    before = [pool.task(ordinal) for ordinal in ordinals]
    assert path.stat().st_size > 3 * BLOCK_BYTES
    if change == "edited":
        place = path.read_bytes().rindex(b"answer")
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"ANSWER")
    elif change in ("cut", "emptied"):
        os.truncate(path, 0 if change == "emptied" else path.stat().st_size - 10)
    elif change == "replaced":  # the old one is open, and stays what it is
        (tmp_path / "new").write_bytes(b"{}\n")
        (tmp_path / "new").replace(path)
    elif change == "touched":
        path.touch()
    else:
        with path.open("a") as file:
            file.write(json.dumps(records[0]) + "\n")

    if change in ("edited", "cut", "emptied"):
        with pytest.raises(DataChanged, match=r"p\.jsonl: bytes \d+ to \d+ were changed while the run read them"):
            [pool.task(ordinal) for ordinal in ordinals]
    else:
        assert [pool.task(ordinal) for ordinal in ordinals] == before
    pool.close()


def test_a_changed_holdout_file_is_refused(tmp_path, chatty):
    path = write(tmp_path / "p.jsonl", conversations(20))
    holdout = write(tmp_path / "h.jsonl", conversations(25)[20:])
    spec = spec_of(path, data={"holdout": str(holdout)})
    planned = validate_prompts(spec, chatty).data
    write(holdout, conversations(30)[25:])
    with pytest.raises(DataChanged, match=r"h\.jsonl"):
        EncodedPrompts(spec, chatty, planned)


def test_a_dataset_directory_with_another_file_in_it_is_refused(tmp_path, chatty):
    write(tmp_path / "train-1.jsonl", conversations(30))
    spec = spec_of(f"hf:{tmp_path}")
    planned = validate_prompts(spec, chatty).data
    EncodedPrompts(spec, chatty, planned).close()
    write(tmp_path / "train-2.jsonl", conversations(40)[30:])
    with pytest.raises(DataChanged, match=r"expected revision .* found"):
        EncodedPrompts(spec, chatty, planned)


# --- held-out prompts can be told from the others, and decoded --------------------------------------------------------


def asked_with(tools):
    return {"messages": conversations(1)[0]["messages"], "tools": tools}


def a_call(name, number):
    call = {"id": f"call-{number}", "function": {"name": name, "arguments": "{}"}}
    return {
        "messages": [
            {"role": "user", "content": "go on"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "done", "tool_call_id": f"call-{number}"},
            {"role": "assistant", "content": "it is done"},
        ]
    }


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (asked_with([{"name": "search"}]), asked_with([{"name": "calculate"}])),
        (a_call("search", 1), a_call("calculate", 1)),
        *(
            tuple({"messages": [*before, {"role": "assistant", "content": f"word {n}"}]} for n in range(2))
            for before in ([], [{"role": "system", "content": "be kind"}])
        ),
        ({"input_ids": [0, 5, 6], "loss_mask": [0, 1, 1]}, {"input_ids": [0, 5, 7], "loss_mask": [0, 1, 1]}),
    ],
    ids=["tools", "tool calls", "assistant first", "assistant after the system", "only BOS is masked"],
)
def test_different_questions_have_different_keys(one, other):
    assert prompt_key(parse_record(one, "auto")) != prompt_key(parse_record(other, "auto"))


def test_ids_of_calls_are_no_part_of_the_question():
    assert prompt_key(parse_record(a_call("f", 1), "auto")) == prompt_key(parse_record(a_call("f", 2), "auto"))


def test_rows_in_which_only_the_first_token_is_masked_are_trained_on(tmp_path, chatty):
    rows = [{"input_ids": [0, 5, 6, 7 + n, 9], "loss_mask": [0, 1, 1, 1, 1]} for n in range(40)]
    spec = spec_of(write(tmp_path / "p.jsonl", rows), evaluation={"prompts": 4})
    assert validate_prompts(spec, chatty).count == 36
    pool = EncodedPrompts(spec, chatty)
    assert all(isinstance(pool.task(ordinal), PromptTask) for ordinal in range(36))


def test_prompts_that_all_ask_the_same_as_a_held_out_one_are_refused(tmp_path, chatty):
    rows = [{"input_ids": [0, 5, 6, 7 + n, 9], "loss_mask": [0, 0, 0, 1, 1]} for n in range(40)]
    path = write(tmp_path / "p.jsonl", rows)
    with pytest.raises(PromptError, match=r"36 of 36 prompts ask the same as one that is held out.*data\.holdout"):
        validate_prompts(spec_of(path, evaluation={"prompts": 4}), chatty)
    assert validate_prompts(spec_of(path, evaluation={"prompts": 0}), chatty).count == 40


@pytest.mark.parametrize("rows", [200, 3], ids=["all too long", "too few"])
def test_an_evaluation_without_prompts_to_decode_is_refused(tmp_path, chatty, rows):
    turns = [
        {"messages": [
            *conversations(rows)[n]["messages"],
            {"role": "user", "content": "a long tool result " * 40}, {"role": "assistant", "content": "fine"},
        ]}
        for n in range(rows)
    ]  # fmt: skip
    path = write(tmp_path / "p.jsonl", turns)
    with pytest.raises(PromptError, match=r"evaluation\.prompts: expected some held-out prompts to decode, found"):
        validate_prompts(spec_of(path, evaluation={"prompts": 16}), chatty)
    assert validate_prompts(spec_of(path, evaluation={"prompts": 0}), chatty).count == rows


# --- streams are not what they say ------------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [40, 80], ids=["the card says less", "the card says more"])
def test_a_stream_has_the_rows_it_has_whatever_its_card_says(tmp_path, chatty, monkeypatch, said):
    write(tmp_path / "train.jsonl", conversations(60))
    spec = spec_of(f"hf:{tmp_path}", evaluation={"prompts": 0}, data={"epochs": 2})

    def asked(skip):
        source = PromptSource.from_spec(spec, chatty, group=8, skip=skip)
        found = {}
        while (batch := source.lease("w")) is not None:
            found |= {task.ordinal: task.input_ids for task in batch.tasks if task.ordinal in batch.leases}
            for lease in batch.leases.values():
                source.complete(lease)
        assert source.drained
        source.close()
        return found

    silent = asked(None)
    monkeypatch.setattr(DatasetStream, "rows", said)
    assert validate_prompts(spec, chatty).total == 2 * said, "what the plan goes by"
    whole = asked(None)
    assert sorted(whole) == list(range(120))
    assert whole == silent
    resumed = asked(OrdinalSet([(0, 89)]))
    assert resumed == {ordinal: whole[ordinal] for ordinal in range(90, 120)}


def wrapped(error):
    """An error as a library wraps it."""
    try:
        raise RuntimeError("cannot read shard 3") from error
    except RuntimeError as whole:
        return whole


@pytest.mark.parametrize(
    "errors",
    [
        (aiohttp.ClientPayloadError("cut"), ConnectionResetError("reset")),
        (httpx.ReadTimeout("slow"), requests.exceptions.ChunkedEncodingError("cut")),
        (urllib3.exceptions.ProtocolError("cut"), http.client.IncompleteRead(b"")),
        (HfHubHTTPError("gone", response=httpx.Response(503, request=httpx.Request("GET", "http://hub"))), OSError(5)),
        (wrapped(aiohttp.ServerDisconnectedError()), TimeoutError()),
    ],
    ids=["aiohttp", "httpx and requests", "urllib3 and http", "hub and mount", "wrapped"],
)
def test_a_network_that_fails_for_a_moment_is_waited_for(tmp_path, monkeypatch, errors):
    write(tmp_path / "train.jsonl", conversations(30))
    stream = DatasetStream(DatasetName.parse(f"hf:{tmp_path}"))
    options = {"seed": 1, "skip": 2, "shuffle": True}
    undisturbed = [stream.read(0, position, **options) for position in range(29)]
    rows, failures = stream._dataset.skip, iter(errors)

    class Cut:
        """The rows, of which the tenth cannot be read at first, and then not even the first."""

        def __init__(self, inner):
            self.inner = inner

        def shuffle(self, **how):
            return Cut(self.inner.shuffle(**how))

        def __iter__(self):
            for number, row in enumerate(self.inner):
                if number in (0, 9) and (number == 9 or len(seen) > 1) and (error := next(failures, None)):
                    raise error
                yield row

    seen = []
    monkeypatch.setattr(stream._dataset, "skip", lambda count: seen.append(count) or Cut(rows(count)))
    monkeypatch.setattr(files, "_PAUSE_S", 0.0)
    stream.close()
    assert [stream.read(0, position, **options) for position in range(29)] == undisturbed
    assert len(seen) == 3, "it was begun again twice"


def test_tokens_that_the_target_does_not_have_are_rejected(tmp_path, chatty):
    facts = read_target_facts(RunSpec.model_validate(
        {"target": {"model": str(DEMO_TARGET)}, "data": {"prompts": "p"}}
    ).target).model_copy(update={"vocab_size": len(chatty) - 1})  # fmt: skip
    last = {"input_ids": [1, 2, 3, len(chatty) - 1], "loss_mask": [0, 0, 1, 1]}
    spec = spec_of(write(tmp_path / "p.jsonl", [*conversations(8), last]), evaluation={"prompts": 0})
    pool = EncodedPrompts(spec, chatty, facts=facts)
    outcomes = [pool.task(ordinal) for ordinal in range(9)]
    assert sum(isinstance(outcome, PromptTask) for outcome in outcomes) == 8
    [rejected] = [outcome for outcome in outcomes if not isinstance(outcome, PromptTask)]
    assert rejected.reason == f"token id {len(chatty) - 1} is not of the target, which has {len(chatty) - 1} tokens"
