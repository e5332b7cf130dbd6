"""The loss mask of conversations, token by token, against spans that were written by hand.

In the expected texts what the assistant says, and may be trained on, stands between ⟦ and ⟧.
"""

from __future__ import annotations

import pytest

from disagg_core.prompts.chat import ChatTemplate
from disagg_core.prompts.loss_mask import (
    MaskRules,
    UnmaskableTemplate,
    conversation_spans,
    end_tokens_of,
    mask_of_spans,
)
from disagg_core.prompts.records import parse_record
from disagg_core.prompts.shapes import Conversation
from tests.unit.prompts import templates

pytestmark = pytest.mark.unit

TURNS = [
    {"role": "user", "content": "first question?"},
    {"role": "assistant", "content": "first answer."},
    {"role": "user", "content": "second question?"},
    {"role": "assistant", "content": "second answer!"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def check(tokenizer, template, messages, expected, *, tools=None, rules=None):
    """Compare text and mask, token by token, with the text in which the live parts are between brackets."""
    conversation = parse_record({"messages": messages, **({"tools": tools} if tools else {})}, "messages")
    assert isinstance(conversation, Conversation)
    text, spans = conversation_spans(
        ChatTemplate(tokenizer, template), conversation, rules or MaskRules(), end_tokens_of(tokenizer)
    )
    plain, live, inside = "", [], False
    for sign in expected:
        if sign in "⟦⟧":
            inside = sign == "⟦"
        else:
            plain += sign
            live.append(int(inside))
    assert text == plain
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = mask_of_spans(encoding["offset_mapping"], spans)
    for (start, stop), value in zip(encoding["offset_mapping"], mask, strict=True):
        assert [value] * (stop - start) == live[start:stop], (text[start:stop], start, value)


def test_chatml(tokenizer):
    check(
        tokenizer, templates.CHATML, [SYSTEM, *TURNS],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nfirst question?<|im_end|>\n"
        "<|im_start|>assistant\n⟦first answer.<|im_end|>⟧\n<|im_start|>user\nsecond question?<|im_end|>\n"
        "<|im_start|>assistant\n⟦second answer!<|im_end|>⟧\n",
    )  # fmt: skip


def test_chatml_writes_a_system_turn_of_its_own(tokenizer):
    check(
        tokenizer, templates.CHATML, TURNS[:2],
        "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\nfirst question?<|im_end|>\n"
        "<|im_start|>assistant\n⟦first answer.<|im_end|>⟧\n",
    )  # fmt: skip


TOOL = {"type": "function", "function": {"name": "add"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL_TURNS = [
    {"role": "user", "content": "one and one?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "c1"},
    {"role": "assistant", "content": "two."},
]
TOOL_HEAD = (
    '<|im_start|>system\nTools: [{"type": "function", "function": {"name": "add"}}]<|im_end|>\n'
    "<|im_start|>user\none and one?<|im_end|>\n<|im_start|>assistant\n"
)


def test_tool_calls_are_trained_on(tokenizer):
    check(
        tokenizer, templates.CHATML, TOOL_TURNS,
        TOOL_HEAD + '⟦<tool_call>add{"a": 1}</tool_call><|im_end|>⟧\n<|im_start|>user\nresult: 2<|im_end|>\n'
        "<|im_start|>assistant\n⟦two.<|im_end|>⟧\n",
        tools=[TOOL],
    )  # fmt: skip


def test_tool_calls_can_be_left_out(tokenizer):
    check(
        tokenizer, templates.CHATML, TOOL_TURNS,
        TOOL_HEAD + '<tool_call>add{"a": 1}</tool_call><|im_end|>\n<|im_start|>user\nresult: 2<|im_end|>\n'
        "<|im_start|>assistant\n⟦two.<|im_end|>⟧\n",
        tools=[TOOL], rules=MaskRules(tool_calls=False),
    )  # fmt: skip


def test_the_last_turn_alone(tokenizer):
    check(
        tokenizer, templates.CHATML, [SYSTEM, *TURNS],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nfirst question?<|im_end|>\n"
        "<|im_start|>assistant\nfirst answer.<|im_end|>\n<|im_start|>user\nsecond question?<|im_end|>\n"
        "<|im_start|>assistant\n⟦second answer!<|im_end|>⟧\n",
        rules=MaskRules(last_only=True),
    )  # fmt: skip


def test_llama3(tokenizer):
    check(
        tokenizer, templates.LLAMA3, [SYSTEM, *TURNS],
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nfirst question?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦first answer.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nsecond question?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦second answer!<|eot_id|>⟧",
    )  # fmt: skip


def test_mistral(tokenizer):
    check(
        tokenizer, templates.MISTRAL, TURNS,
        "<s>[INST] first question?[/INST]⟦ first answer.</s>⟧[INST] second question?[/INST]⟦ second answer!</s>⟧",
    )  # fmt: skip


def test_mistral_moves_the_system_message_into_the_last_question(tokenizer):
    """Prefixes differ from the whole text, so the first turn is found by a stand-in for its content.

    The space before it belongs to the template then, and is not trained on.
    """
    check(
        tokenizer, templates.MISTRAL, [SYSTEM, *TURNS],
        "<s>[INST] first question?[/INST] ⟦first answer.</s>⟧[INST] Be brief.\n\nsecond question?[/INST]"
        "⟦ second answer!</s>⟧",
    )  # fmt: skip


def test_gemma(tokenizer):
    check(
        tokenizer, templates.GEMMA, TURNS,
        "<bos><start_of_turn>user\nfirst question?<end_of_turn>\n<start_of_turn>model\n⟦first answer.<end_of_turn>⟧\n"
        "<start_of_turn>user\nsecond question?<end_of_turn>\n<start_of_turn>model\n⟦second answer!<end_of_turn>⟧\n",
    )  # fmt: skip


THOUGHTS = [
    {"role": "user", "content": "first question?"},
    {"role": "assistant", "content": "<think>\nlong ago\n</think>\n\nfirst answer."},
    {"role": "user", "content": "second question?"},
    {"role": "assistant", "content": "second answer!", "reasoning_content": "right now"},
]


def test_thinking_template_drops_old_thoughts_and_trains_on_new_ones(tokenizer):
    """The opening ``<think>`` is part of the header: a server writes it, not the target."""
    check(
        tokenizer, templates.THINKING, THOUGHTS,
        "<|im_start|>user\nfirst question?<|im_end|>\n<|im_start|>assistant\n⟦first answer.<|im_end|>⟧\n"
        "<|im_start|>user\nsecond question?<|im_end|>\n<|im_start|>assistant\n<think>\n"
        "⟦right now\n</think>\n\nsecond answer!<|im_end|>⟧\n",
    )  # fmt: skip


def test_thoughts_can_be_left_out(tokenizer):
    check(
        tokenizer, templates.THINKING, THOUGHTS,
        "<|im_start|>user\nfirst question?<|im_end|>\n<|im_start|>assistant\n⟦first answer.<|im_end|>⟧\n"
        "<|im_start|>user\nsecond question?<|im_end|>\n<|im_start|>assistant\n<think>\nright now\n</think>\n\n"
        "⟦second answer!<|im_end|>⟧\n",
        rules=MaskRules(thinking=False),
    )  # fmt: skip


def test_thoughts_inside_plain_content_can_be_left_out(tokenizer):
    check(
        tokenizer, templates.CHATML, [SYSTEM, *THOUGHTS[:2]],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nfirst question?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\nlong ago\n</think>\n\n⟦first answer.<|im_end|>⟧\n",
        rules=MaskRules(thinking=False),
    )  # fmt: skip


@pytest.mark.parametrize("rules", [MaskRules(), MaskRules(last_only=True)])
def test_generation_blocks_of_the_template_are_taken_as_they_are(tokenizer, rules):
    first = "first answer.<|im_end|>"
    check(
        tokenizer, templates.MARKED, TURNS,
        "<|im_start|>user\nfirst question?<|im_end|>\n<|im_start|>assistant\n"
        + (first if rules.last_only else f"⟦{first}⟧")
        + "\n<|im_start|>user\nsecond question?<|im_end|>\n<|im_start|>assistant\n⟦second answer!<|im_end|>⟧\n",
        rules=rules,
    )  # fmt: skip


def test_a_template_that_cannot_be_masked_is_named(tokenizer):
    with pytest.raises(UnmaskableTemplate, match="generation"):
        check(tokenizer, templates.SHUFFLING, TURNS, "")


def test_a_token_that_begins_before_a_span_is_not_trained_on():
    offsets = [(0, 4), (4, 9), (9, 12), (12, 12), (12, 15)]
    assert mask_of_spans(offsets, [(6, 13)]) == [0, 0, 1, 1, 1]
    assert mask_of_spans(offsets, [(4, 9), (12, 15)]) == [0, 1, 0, 0, 1]
