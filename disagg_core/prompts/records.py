"""Records of a prompts file in any of the known formats, parsed into three plain shapes.

`messages` and `sharegpt` become a `Conversation`; `prompt_response` a `PromptResponse`; `text` a `PlainText`;
`tokenized` a `Tokenized`. What is wrong with a record is said as a `RecordError`; the caller adds file and line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import msgspec

Format = Literal["messages", "sharegpt", "prompt_response", "text", "tokenized"]
FormatOrAuto = Literal["auto", "messages", "sharegpt", "prompt_response", "text", "tokenized"]

_FORMAT_KEYS: tuple[tuple[str, Format], ...] = (
    ("input_ids", "tokenized"),
    ("messages", "messages"),
    ("conversations", "sharegpt"),
    ("prompt", "prompt_response"),
    ("text", "text"),
)
_RESPONSE_KEYS = ("response", "completion", "output")
_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_ASKING_ROLES = ("user", "tool")
_TOOL_CALL_ROLES = ("function_call", "tool_call")
_KEPT_KEYS = ("name", "tool_call_id", "reasoning_content", "thinking")

Message: TypeAlias = dict[str, Any]


class RecordError(ValueError):
    """A record that cannot be used: what was expected and what was found."""


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's form, with the tools that the conversation may call.

    `tool_call_turns` are the positions of assistant messages that are calls, also where the format writes a call as
    plain content.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    tool_call_turns: frozenset[int] = frozenset()


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


def detect_format(record: Mapping[str, Any]) -> Format:
    """Return the format of `record` by its keys.

    Raises:
        RecordError: it has none of the known keys.
    """
    for key, format_ in _FORMAT_KEYS:
        if key in record:
            return format_
    known = ", ".join(key for key, _ in _FORMAT_KEYS)
    raise RecordError(f"expected one of the keys {known}; found {', '.join(sorted(map(str, record))) or 'none'}")


def parse_record(record: object, format_: FormatOrAuto) -> Record:
    """Return `record` in its plain shape.

    Raises:
        RecordError: it does not have the format, names an unknown role, or holds nothing.
    """
    if not isinstance(record, Mapping):
        raise RecordError(f"expected a JSON object, found {_kind(record)}")
    match detect_format(record) if format_ == "auto" else format_:
        case "tokenized":
            return _tokenized(record)
        case "messages":
            return _conversation(record, "messages")
        case "sharegpt":
            return _conversation(record, "conversations")
        case "prompt_response":
            return _prompt_response(record)
        case "text":
            return PlainText(_text(record, "text"))


def prompt_key(record: Record) -> bytes:
    """Return a hash of what the record asks: everything before its last answer. Equal prompts have equal keys.

    A record that asks nothing (an assistant's first word, a row whose first token alone is masked) is told from others
    by all of it. Ids of tool calls are drawn at random, so they tell nothing.
    """
    match record:
        case Conversation(messages, tools):
            context = messages[: context_length(messages)]
            asks = any(message["role"] in _ASKING_ROLES for message in context)
            asked: object = [*map(_said, context if asks else messages), *([{"tools": tools}] if tools else [])]
        case PromptResponse(prompt):
            asked = [["user", prompt]]
        case PlainText(text):
            asked = text
        case Tokenized(input_ids, loss_mask):
            asked = input_ids[: answer_start(loss_mask)]
    return hashlib.blake2b(msgspec.json.encode(asked), digest_size=12).digest()


def context_length(messages: Sequence[Message]) -> int:
    """Return how many messages come before the last assistant turn; all of them if the last is no assistant's."""
    last = len(messages) - 1
    return last if messages[last]["role"] == "assistant" else len(messages)


def _said(message: Message) -> list[object]:
    """Return what tells a message from others."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return [message["role"], message.get("content"), *([calls] if calls else [])]


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


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise RecordError(f"{key}: expected a string, found {_kind(value)}")
    if not value.strip():
        raise RecordError(f"{key}: expected some text, found an empty string")
    return value


def _prompt_response(record: Mapping[str, Any]) -> PromptResponse:
    prompt = _text(record, "prompt")
    for key in _RESPONSE_KEYS:
        if record.get(key) is not None:
            return PromptResponse(prompt, _text(record, key))
    return PromptResponse(prompt, None)


def _tokenized(record: Mapping[str, Any]) -> Tokenized:
    ids = record.get("input_ids")
    if not isinstance(ids, Sequence) or isinstance(ids, str) or not ids:
        raise RecordError(f"input_ids: expected a list of token ids, found {_kind(ids) if ids != [] else 'none'}")
    if not all(type(token) is int and token >= 0 for token in ids):
        raise RecordError("input_ids: expected token ids of 0 and above only")
    mask = record.get("loss_mask")
    if mask is None:
        return Tokenized(list(ids), [1] * len(ids))
    if not isinstance(mask, Sequence) or len(mask) != len(ids):
        found = len(mask) if isinstance(mask, Sequence) else _kind(mask)
        raise RecordError(f"loss_mask: expected {len(ids)} numbers, one for each of input_ids, found {found}")
    if not all(value in (0, 1) for value in mask):
        raise RecordError("loss_mask: expected 0 and 1 only")
    return Tokenized(list(ids), [int(value) for value in mask])


def _conversation(record: Mapping[str, Any], key: str) -> Conversation:
    turns = record.get(key)
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise RecordError(f"{key}: expected a list of messages, found {_kind(turns)}")
    if not turns:
        raise RecordError(f"{key}: expected at least one message, found an empty conversation")
    messages: list[Message] = []
    calls: set[int] = set()
    if isinstance(system := record.get("system"), str) and system:
        messages.append({"role": "system", "content": system})
    for number, turn in enumerate(turns):
        message, is_call = _message(turn, f"{key}[{number}]")
        if is_call:
            calls.add(len(messages))
        messages.append(message)
    return Conversation(messages, _tools(record.get("tools")), frozenset(calls))


def _message(turn: object, where: str) -> tuple[Message, bool]:
    """Return one message in OpenAI's form and whether it is a tool call."""
    if not isinstance(turn, Mapping):
        raise RecordError(f"{where}: expected an object with role and content, found {_kind(turn)}")
    given = turn.get("role", turn.get("from"))
    role = _ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        known = ", ".join(sorted(_ROLES))
        raise RecordError(f"{where}: unknown role {given!r}; known are {known}")
    content = _content(turn.get("content", turn.get("value")), where)
    calls = turn.get("tool_calls")
    if content is None and not calls:
        raise RecordError(f"{where}: expected content or tool_calls, found neither")
    message: Message = {"role": role, "content": content if content is not None else ""}
    message |= {key: turn[key] for key in _KEPT_KEYS if turn.get(key) is not None}
    if calls:
        message["tool_calls"] = [_call(call, where) for call in calls]
    return message, bool(calls) or given in _TOOL_CALL_ROLES


def _content(content: object, where: str) -> str | None:
    """Return a message's text; a list of text parts is joined."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RecordError(f"{where}: expected content to be a string or a list of parts, found {_kind(content)}")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise RecordError(f"{where}: expected parts of text only, found {kind!r}: only text is captured")
        texts.append(part["text"])
    return "".join(texts)


def _call(call: object, where: str) -> Message:
    """Return a tool call whose arguments are an object: templates write them with ``tojson``."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function", call), Mapping):
        raise RecordError(f"{where}: expected tool_calls to be objects, found {_kind(call)}")
    function = dict(call.get("function", call))
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = msgspec.json.decode(arguments or "{}")
        except msgspec.DecodeError as error:
            raise RecordError(f"{where}: arguments of a tool call are no JSON: {error}") from error
    return {**{k: v for k, v in call.items() if k == "id"}, "type": "function", "function": function}


def _tools(tools: object) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):
        try:
            tools = msgspec.json.decode(tools) if tools.strip() else None
        except msgspec.DecodeError as error:
            raise RecordError(f"tools: expected JSON, found {error}") from error
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RecordError(f"tools: expected a list of tool descriptions, found {_kind(tools)}")
    return [dict(tool) for tool in tools]
