"""What is trained on in a conversation of several turns, in the formats of widely used model families.

The expected texts are written by hand; what the assistant generates stands between ⟦ and ⟧, and every token of the
text is compared with it. The token that ends a turn is generated.
"""

# ruff: noqa: RUF001 - DeepSeek's tokens have such bars

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from disagg_core.errors import PromptError, PromptRejected
from disagg_core.prompts.chat import ChatTemplate
from disagg_core.prompts.checks import heldout_prompts, validate_prompts
from disagg_core.prompts.encode import PromptEncoder
from disagg_core.prompts.inspection import masked_text
from disagg_core.prompts.loss_mask import MaskRules, conversation_spans, end_tokens_of, mask_of_spans
from disagg_core.prompts.records import parse_record
from disagg_core.run_spec.document import RunSpec
from disagg_core.target.tokenizer import tokenizer_version, version_in_use
from tests.unit.prompts import styles, templates
from tests.unit.prompts.test_prompts import conversations, spec_of, write

pytestmark = pytest.mark.unit

MORE_SPECIALS = [
    "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|im_sep|>", "<|observation|>", "[gMASK]", "<sop>",
    "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>", "[TOOL_CALLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "<tool_response>", "</tool_response>", "<｜begin▁of▁sentence｜>", "<｜User｜>",
    "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
    "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
]  # fmt: skip


@pytest.fixture(scope="module")
def known(tokenizer):
    """The small tokenizer with the special tokens of all these families; its words stay as they are."""
    raw = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    wider = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    wider.add_special_tokens({"additional_special_tokens": MORE_SPECIALS})
    return wider


SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1."},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2."},
]
CALL = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add"}}
TOOL_TURNS = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "7", "tool_call_id": "c"},
    {"role": "assistant", "content": "1."},
    *TURNS[2:],
]
THINKING_TURNS = [
    TURNS[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "hm"},
    TOOL_TURNS[2],
    {"role": "assistant", "content": "1.", "reasoning": "so"},
    TURNS[2],
    {"role": "assistant", "content": "2.", "thinking": "ah"},
]


def rendered(tokenizer, template, record, *, rules=None, kwargs=None, stops=()):
    """Return the text of `record` with brackets around the tokens that are trained on."""
    chat = ChatTemplate(tokenizer, template, kwargs, tokenizer.convert_tokens_to_ids(list(stops)))
    conversation = parse_record(record, "auto")
    text, spans = conversation_spans(chat, conversation, rules or MaskRules(), end_tokens_of(tokenizer))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = mask_of_spans(encoding["offset_mapping"], spans)
    shown, inside = "", 0
    for (start, stop), live in zip(encoding["offset_mapping"], mask, strict=True):
        shown += {(0, 1): "⟦", (1, 0): "⟧"}.get((inside, live), "") + text[start:stop]
        inside = live
    return shown + "⟧" * inside


QWEN_TOOLS = '<|im_start|>system\nTools:\n{"type": "function", "function": {"name": "add"}}<|im_end|>\n'
QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>'
QWEN_RESULT = "<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n"

STYLES = {
    "Qwen2.5, ChatML": (
        templates.CHATML, [SYSTEM, *TURNS], {},
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n"
        "⟦1.<|im_end|>⟧\n<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\n⟦2.<|im_end|>⟧\n",
    ),
    "Qwen3": (
        styles.QWEN3, TURNS, {},
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n⟦1.<|im_end|>⟧\n<|im_start|>user\ntwo?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\n2.<|im_end|>⟧\n",
    ),
    "Qwen3, not thinking": (
        styles.QWEN3, TURNS, {"kwargs": {"enable_thinking": False}},
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n⟦1.<|im_end|>⟧\n<|im_start|>user\ntwo?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n⟦2.<|im_end|>⟧\n",
    ),
    "Qwen3, thoughts and calls": (
        styles.QWEN3, THINKING_TURNS, {"tools": [TOOL]},
        QWEN_TOOLS + "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n⟦" + QWEN_CALL + "⟧\n" + QWEN_RESULT
        + "<|im_start|>assistant\n⟦1.<|im_end|>⟧\n<|im_start|>user\ntwo?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nah\n</think>\n\n2.<|im_end|>⟧\n",
    ),
    "Qwen3, thoughts between calls": (
        styles.QWEN3, THINKING_TURNS[:4], {"tools": [TOOL]},
        QWEN_TOOLS + "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhm\n</think>\n\n" + QWEN_CALL
        + "⟧\n" + QWEN_RESULT + "<|im_start|>assistant\n⟦<think>\nso\n</think>\n\n1.<|im_end|>⟧\n",
    ),
    "Llama 3": (
        styles.LLAMA3, [SYSTEM, *TURNS], {},
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\none?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦1.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\ntwo?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦2.<|eot_id|>⟧",
    ),
    "Llama 3, calls": (
        styles.LLAMA3, TOOL_TURNS, {},
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\none?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦" '{"name": "add", "parameters": {"a": 1}}<|eot_id|>⟧'
        "<|start_header_id|>ipython<|end_header_id|>\n\n7<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦1.<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\ntwo?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦2.<|eot_id|>⟧",
    ),
    "Gemma": (
        styles.GEMMA, [SYSTEM, *TURNS], {},
        "<bos><start_of_turn>user\nBe brief.\n\none?<end_of_turn>\n<start_of_turn>model\n⟦1.<end_of_turn>⟧\n"
        "<start_of_turn>user\ntwo?<end_of_turn>\n<start_of_turn>model\n⟦2.<end_of_turn>⟧\n",
    ),
    "Mistral": (
        styles.MISTRAL, TURNS, {},
        "<s>[INST] one? [/INST]⟦ 1.</s>⟧[INST] two? [/INST]⟦ 2.</s>⟧",
    ),
    "Mistral, calls": (
        styles.MISTRAL, TOOL_TURNS, {},
        '<s>[INST] one? [/INST]⟦[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}]</s>⟧[TOOL_RESULTS]7[/TOOL_RESULTS]'
        "⟦ 1.</s>⟧[INST] two? [/INST]⟦ 2.</s>⟧",
    ),
    "Phi-3": (
        styles.PHI3, [SYSTEM, *TURNS], {},
        "<|system|>\nBe brief.<|end|>\n<|user|>\none?<|end|>\n<|assistant|>\n⟦1.<|end|>⟧\n"
        "<|user|>\ntwo?<|end|>\n<|assistant|>\n⟦2.<|end|>⟧\n",
    ),
    "Phi-4": (
        styles.PHI4, [SYSTEM, *TURNS], {},
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>one?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>⟦1.<|im_end|>⟧<|im_start|>user<|im_sep|>two?<|im_end|>"
        "<|im_start|>assistant<|im_sep|>⟦2.<|im_end|>⟧",
    ),
    "DeepSeek R1": (
        styles.R1, [SYSTEM, *TURNS], {"stops": ["<｜end▁of▁sentence｜>"]},
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>one?<｜Assistant｜>⟦1.<｜end▁of▁sentence｜>⟧"
        "<｜User｜>two?<｜Assistant｜>⟦2.<｜end▁of▁sentence｜>⟧",
    ),
    "DeepSeek R1, thoughts cut off and calls as text": (
        styles.R1,
        [TURNS[0], {**TOOL_TURNS[1], "reasoning_content": "hm"}, TOOL_TURNS[2],
         {"role": "assistant", "content": "<think>\nso\n</think>\n\n1."}], {"stops": ["<｜end▁of▁sentence｜>"]},
        "<｜begin▁of▁sentence｜><｜User｜>one?<｜Assistant｜><think>\n⟦hm\n</think>\n\n<｜tool▁call▁begin｜>function"
        '<｜tool▁sep｜>add\n{"a":1}<｜tool▁call▁end｜><｜end▁of▁sentence｜>⟧<｜tool▁output▁begin｜>7<｜tool▁output▁end｜>'
        "⟦\n\n1.<｜end▁of▁sentence｜>⟧",
    ),
    "GLM-4": (
        styles.GLM4, TOOL_TURNS, {"stops": ["<|user|>", "<|observation|>"]},
        '[gMASK]<sop><|user|>\none?<|assistant|>⟦add\n{"a": 1}<|observation|>⟧\n7<|assistant|>⟦\n1.<|user|>⟧\ntwo?'
        "<|assistant|>⟦\n2.⟧",
    ),
    "gpt-oss, harmony": (
        styles.HARMONY, [SYSTEM, *THINKING_TURNS], {"stops": ["<|return|>", "<|call|>"]},
        "<|start|>system<|message|>Be brief.<|end|><|start|>user<|message|>one?<|end|>"
        "<|start|>assistant⟦<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.add"
        '<|channel|>commentary json<|message|>{"a": 1}<|call|>⟧'
        "<|start|>functions to=assistant<|channel|>commentary<|message|>7<|end|>"
        "<|start|>assistant⟦<|channel|>final<|message|>1.<|end|>⟧<|start|>user<|message|>two?<|end|>"
        "<|start|>assistant⟦<|channel|>analysis<|message|>ah<|end|><|start|>assistant"
        "<|channel|>final<|message|>2.<|return|>⟧",
    ),
    "gpt-oss, harmony, without thoughts": (
        styles.HARMONY, THINKING_TURNS[4:], {"stops": ["<|return|>", "<|call|>"], "rules": MaskRules(thinking=False)},
        "<|start|>user<|message|>two?<|end|><|start|>assistant<|channel|>analysis<|message|>ah<|end|>"
        "⟦<|start|>assistant<|channel|>final<|message|>2.<|return|>⟧",
    ),
    "Zephyr": (
        styles.ZEPHYR, [SYSTEM, *TURNS], {},
        "<|system|>\nBe brief.</s>\n<|user|>\none?</s>\n<|assistant|>\n⟦1.</s>⟧\n<|user|>\ntwo?</s>\n<|assistant|>\n"
        "⟦2.</s>⟧\n",
    ),
    "Vicuna": (
        styles.VICUNA, [SYSTEM, *TURNS], {},
        "Be brief. USER: one? ASSISTANT:⟦ 1.</s>⟧USER: two? ASSISTANT:⟦ 2.</s>⟧",
    ),
    "generation blocks without the end of turn": (
        styles.MARKED_CHATML, TURNS, {},
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n⟦1.<|im_end|>⟧\n<|im_start|>user\ntwo?<|im_end|>\n"
        "<|im_start|>assistant\n⟦2.<|im_end|>⟧\n",
    ),
    "generation blocks, the end behind a space": (
        styles.MARKED_LLAMA2, TURNS, {}, "<s>[INST] one? [/INST]⟦ 1. </s>⟧<s>[INST] two? [/INST]⟦ 2. </s>⟧",
    ),
    "generation blocks with the end of turn": (
        styles.MARKED_PHI3, TURNS, {},
        "<|user|>\none?<|end|>\n<|assistant|>\n⟦1.<|end|>⟧\n<|user|>\ntwo?<|end|>\n<|assistant|>\n⟦2.<|end|>⟧\n",
    ),
    "generation blocks that end with the next header": (
        styles.MARKED_GLM4, TURNS, {"stops": ["<|user|>"]},
        "[gMASK]<sop><|user|>\none?<|assistant|>\n⟦1.<|user|>⟧\ntwo?<|assistant|>\n⟦2.⟧",
    ),
    "calls that a template prints as they are": (
        styles.PRINTED_CALLS, TOOL_TURNS[:2], {},
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>add {"a":1}</tool_call><|im_end|>⟧\n',
    ),
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_what_the_assistant_generates_is_trained_on(known, style):
    template, messages, how, expected = STYLES[style]
    how = dict(how)
    record = {"messages": messages, "tools": how.pop("tools", None)}
    assert rendered(known, template, record, **how) == expected


# --- white space ------------------------------------------------------------------------------------------------------

CODE = "def f(x):\n        return x\n\n\n    pass"


def byte_level(trim: bool) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer with tokens of white space, which trims it off its offsets or not."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>", "<|im_end|>"]
    )
    raw.train_from_iterator([CODE] * 20, trainer)
    raw.post_processor = processors.ByteLevel(trim_offsets=trim)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>", chat_template=templates.CHATML)


@pytest.mark.parametrize("content", [CODE, "    " + CODE, "\n" + CODE, CODE + "\n\n        "])
def test_white_space_of_answers_is_trained_on_by_tokenizers_that_trim_it(content):
    record = parse_record({"messages": [TURNS[0], {"role": "assistant", "content": content}]}, "auto")
    trimming, plain = (
        PromptEncoder(spec_of("p", data={"max_tokens": 512}), byte_level(trim)) for trim in (True, False)
    )
    encoded = trimming.encode(record)
    assert encoded == plain.encode(record)
    live = [token for token, value in zip(encoded.input_ids, encoded.loss_mask, strict=True) if value]
    said = trimming.tokenizer.decode(live)
    assert f"{content}<|im_end|>".endswith(said), "a token that begins in the header may take the first spaces along"
    assert said.startswith(CODE) or said.lstrip().startswith(CODE)
    assert sum(encoded.loss_mask) == len(live) > 5
    assert encoded.loss_mask.index(1) + len(live) == len(encoded.loss_mask) - 1, "all of them, without a gap"


def test_tokens_without_characters_are_of_the_span_that_is_on_both_sides_of_them():
    offsets = [(0, 4), (4, 4), (4, 6), (6, 6), (6, 8), (8, 8), (8, 9), (9, 9), (9, 9), (9, 12)]
    assert mask_of_spans(offsets, [(4, 9)]) == [0, 0, 1, 1, 1, 1, 1, 0, 0, 0]
    assert mask_of_spans(offsets, [(4, 8), (9, 12)]) == [0, 0, 1, 1, 1, 0, 0, 0, 0, 1]


# --- thoughts and calls as data has them ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "<think>\nwell\n</think>\n\ntext"},
        {"content": "well\n</think>\n\ntext"},
        {"content": "\nwell\n</think>\n\ntext"},
        {"content": "text", "reasoning_content": "well"},
        {"content": "text", "reasoning": "well"},
        {"content": "text", "thinking": "well"},
        {"content": [{"type": "thinking", "thinking": "well"}, {"type": "text", "text": "text"}]},
    ],
)
@pytest.mark.parametrize("template", [styles.QWEN3, templates.THINKING], ids=["Qwen3", "opens the thought"])
def test_a_thought_is_the_same_wherever_the_data_has_it(known, template, answer):
    found = rendered(known, template, {"messages": [TURNS[0], {"role": "assistant", **answer}]})
    assert found.endswith("well\n</think>\n\ntext<|im_end|>⟧\n")
    assert found.replace("⟦", "").count("<think>\nwell") == 1
    assert found.count("</think>") == 1


def test_a_raw_completion_keeps_its_thought_in_a_template_that_knows_none(known):
    raw = {"messages": [TURNS[0], {"role": "assistant", "content": "well</think>\n\ntext"}]}
    found = rendered(known, styles.ZEPHYR, raw)
    assert found == "<|user|>\none?</s>\n<|assistant|>\n⟦<think>\nwell</think>\n\ntext</s>⟧\n"


def test_developers_are_the_system_to_a_template_that_knows_none(known):
    messages = [{"role": "developer", "content": "Be brief."}, *TURNS[:2]]
    assert "<|im_start|>system\nBe brief." in rendered(known, templates.CHATML, {"messages": messages})


def test_whatever_a_template_raises_rejects_the_record(known):
    for broken in ("{{ messages[7].content.x }}", "{{ 1 / 0 }}", "{{ messages | sum }}", "{{ raise_exception('no') }}"):
        with pytest.raises(PromptRejected, match="the chat template refuses the conversation"):
            ChatTemplate(known, broken).render(TURNS, None)


# --- what the run document gives the template -------------------------------------------------------------------------


@pytest.fixture
def qwen(known):
    """The tokenizer with a template that has a switch."""
    known.chat_template = styles.QWEN3
    yield known
    known.chat_template = None


def silent(**data):
    return {"chat_template_kwargs": {"enable_thinking": False}, **data}


def test_a_switch_of_the_template_reaches_prompts_and_held_out_ones(tmp_path, qwen):
    path = write(tmp_path / "p.jsonl", conversations(20))
    for data, ending in ((silent(), "assistant\n<think>\n\n</think>\n\n"), ({}, "<|im_start|>assistant\n")):
        spec = spec_of(path, data={**data, "generate": {}}, evaluation={"prompts": 4})
        record = parse_record(conversations(1)[0], "auto")
        prompts = [PromptEncoder(spec, qwen).encode(record).input_ids, *heldout_prompts(spec, qwen, 4)]
        assert all("".join(qwen.convert_ids_to_tokens(ids)).endswith(ending) for ids in prompts)
        assert validate_prompts(spec, qwen).evaluated.count(b"\n") == 4


def test_a_record_may_have_a_switch_of_its_own(qwen):
    spec = spec_of("p", data={"generate": {}})
    record = {"prompt": "one?", "chat_template_kwargs": {"enable_thinking": False}}
    ids = PromptEncoder(spec, qwen).encode(parse_record(record, "auto")).input_ids
    assert "".join(qwen.convert_ids_to_tokens(ids)).endswith("</think>\n\n")


def test_a_switch_is_part_of_the_tokenizers_identity(qwen):
    on, off = spec_of("p").data, spec_of("p", data=silent()).data
    assert version_in_use(qwen, on) == tokenizer_version(qwen, styles.QWEN3)
    assert version_in_use(qwen, on) != version_in_use(qwen, off)
    assert version_in_use(qwen, off) == version_in_use(qwen, spec_of("p", data=silent(shuffle=False)).data)


def test_a_switch_that_the_template_does_not_have_is_refused(qwen):
    with pytest.raises(PromptError, match=r"data\.chat_template_kwargs: .*found 'enable_thoughts'"):
        PromptEncoder(spec_of("p", data={"chat_template_kwargs": {"enable_thoughts": True}}), qwen)
    qwen.chat_template = None
    with pytest.raises(PromptError, match="expected a chat template, found none"):
        PromptEncoder(spec_of("p", data=silent()), qwen)


def test_what_rendering_sets_itself_cannot_be_given():
    with pytest.raises(ValueError, match="found add_generation_prompt, tools"):
        spec_of("p", data={"chat_template_kwargs": {"tools": [], "add_generation_prompt": True}})
    stored = spec_of("p", data=silent()).model_dump_json()
    assert RunSpec.model_validate(json.loads(stored)).data.chat_template_kwargs == {"enable_thinking": False}


def test_the_sample_of_an_inspection_is_what_is_trained_on(qwen):
    encoded = PromptEncoder(spec_of("p", data=silent()), qwen).encode(parse_record({"messages": TURNS}, "auto"))
    pieces = [piece.replace(" ", "") for piece, live in masked_text(qwen, encoded) if live]
    assert pieces == ["1.<|im_end|>", "2.<|im_end|>"]
