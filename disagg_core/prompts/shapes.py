"""The plain shapes of a record, whatever format it came in, and what tells one question from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec

_ASKING_ROLES = ("user", "tool")

Message: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's form, with the tools that the conversation may call.

    A thought that has a field of its own is in ``reasoning_content``, arguments of calls are objects. `tool_call_turns`
    are the positions of assistant messages that are calls, also where the format writes a call as plain content.
    `template_kwargs` is what the record itself gives the chat template.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    tool_call_turns: frozenset[int] = frozenset()
    template_kwargs: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class PromptResponse:
    """A prompt and, unless the target is to write it, the response."""

    prompt: str
    response: str | None


@dataclass(frozen=True)
class PlainText:
    """Running text."""

    text: str


@dataclass(frozen=True)
class Tokenized:
    """Token ids with the positions (1) that may be trained on."""

    input_ids: list[int]
    loss_mask: list[int]


Record: TypeAlias = Conversation | PromptResponse | PlainText | Tokenized


def prompt_key(record: Record) -> bytes:
    """Return a hash of what the record asks: everything before its last answer. Equal prompts have equal keys.

    A record that asks nothing (an assistant's first word, a row whose first token alone is masked) is told from others
    by all of it. Ids of tool calls are drawn at random, so they tell nothing.
    """
    match record:
        case Conversation(messages, tools, _, template_kwargs):
            context = messages[: context_length(messages)]
            asks = any(message["role"] in _ASKING_ROLES for message in context)
            asked: object = [
                *map(_said, context if asks else messages),
                *([{"tools": tools}] if tools else []),
                *([{"template_kwargs": template_kwargs}] if template_kwargs else []),
            ]
        case PromptResponse(prompt):
            asked = [["user", prompt]]
        case PlainText(text):
            asked = text
        case Tokenized(input_ids, loss_mask):
            asked = input_ids[: answer_start(loss_mask)]
    return hashlib.blake2b(msgspec.json.encode(asked), digest_size=12).digest()


def record_key(record: Record) -> bytes:
    """Return a hash of all of the record: of text, tools, what its template is given, and mask."""
    return hashlib.blake2b(msgspec.json.encode([type(record).__name__, _all_of(record)]), digest_size=12).digest()


def _all_of(record: Record) -> list[object]:
    if isinstance(record, Conversation):
        return [list(map(_said, record.messages)), record.tools, record.template_kwargs]
    return list(vars(record).values())


def context_length(messages: Sequence[Message]) -> int:
    """Return how many messages come before the last assistant turn; all of them if the last is no assistant's."""
    last = len(messages) - 1
    return last if messages[last]["role"] == "assistant" else len(messages)


def _said(message: Message) -> list[object]:
    """Return what tells a message from others."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    thought = message.get("reasoning_content")
    said: list[object] = [message["role"], message.get("content")]
    return [*said, *([calls] if calls else []), *([{"thought": thought}] if thought else [])]


def is_running_text(record: Record) -> bool:
    """Tell whether nothing in the record is a prompt apart from its answer."""
    if isinstance(record, Tokenized):
        return answer_start(record.loss_mask) == len(record.loss_mask)
    return isinstance(record, PlainText)


def answer_start(loss_mask: Sequence[int]) -> int:
    """Return where the last run of ones begins; the length if there is none, or at most one token before it.

    A single token is what every text of a tokenizer begins with, and asks nothing.
    """
    end = len(loss_mask)
    while end and not loss_mask[end - 1]:
        end -= 1
    start = end
    while start and loss_mask[start - 1]:
        start -= 1
    return start if 1 < start < end else len(loss_mask)
