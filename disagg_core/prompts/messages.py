"""One conversation in the forms that people keep: OpenAI's, ShareGPT's, lists of turns; made OpenAI's.

`ROLES` is the whole of the names that are known for the four roles; they are compared without regard to case. A role
that is not among them rejects its record: guessing would train on the wrong side's words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from disagg_core.prompts.json_values import (
    RecordError,
    checked_depth,
    checked_text,
    decode_json,
    from_json_text,
    kind_of,
)
from disagg_core.prompts.shapes import Conversation, Message
from disagg_core.run_spec.data import OF_THE_RENDERING

ROLES = {
    **dict.fromkeys(("system", "context", "instructions"), "system"),
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "gpt4", "gpt-4", "bing", "bard", "claude", "gemini", "model", "bot", "chatbot"),
        "assistant",
    ),
    **dict.fromkeys(("function_call", "tool_call", "tool_calls"), "assistant"),
    **dict.fromkeys(
        ("tool", "function", "function_response", "tool_response", "tool_result", "observation", "ipython"), "tool"
    ),
}
_TOOL_CALL_ROLES = ("function_call", "tool_call", "tool_calls")
_KEPT_KEYS = ("name", "tool_call_id")
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")


def parse_conversation(
    turns: object, key: str, record: Mapping[str, Any], fields: Mapping[str, str] | None = None
) -> Conversation:
    """Return the conversation of `turns`, which the `record` has under `key`, with the record's tools.

    `fields` may have other names for the ``role`` and the ``content`` of a turn.

    Raises:
        RecordError: there are none, one has an unknown role or no text, or a call or a tool is no JSON.
    """
    turns = from_json_text(turns, key)
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise RecordError(f"{key}: expected a list of messages, found {kind_of(turns)}")
    if not turns:
        raise RecordError(f"{key}: expected at least one message, found an empty conversation")
    messages: list[Message] = []
    calls: set[int] = set()
    if (system := optional_text(record, "system")) is not None:
        messages.append({"role": "system", "content": system})
    for number, turn in enumerate(turns):
        message, is_call = _message(turn, f"{key}[{number}]", fields or {})
        if is_call:
            calls.add(len(messages))
        messages.append(message)
    return Conversation(messages, parse_tools(record.get("tools")), frozenset(calls), parse_kwargs(record))


def optional_text(record: Mapping[str, Any], key: str) -> str | None:
    """Return the text under `key`, or None where there is none or only white space.

    Raises:
        RecordError: it is something else.
    """
    value = record.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise RecordError(f"{key}: expected a string, found {kind_of(value)}")
    return checked_text(value, key) if value.strip() else None


def parse_kwargs(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what the record itself gives the chat template.

    Raises:
        RecordError: it is no object.
    """
    kwargs = from_json_text(record.get("chat_template_kwargs"), "chat_template_kwargs")
    if not kwargs:
        return None
    if not isinstance(kwargs, Mapping):
        raise RecordError(f"chat_template_kwargs: expected an object, found {kind_of(kwargs)}")
    given = {str(name): value for name, value in kwargs.items() if value is not None}
    if found := sorted(OF_THE_RENDERING & set(given)):
        raise RecordError(f"chat_template_kwargs: expected variables of the template's own, found {', '.join(found)}")
    checked_depth(given, "chat_template_kwargs")
    return given or None


def parse_tools(tools: object) -> list[dict[str, Any]] | None:
    """Return descriptions of tools in OpenAI's form, from objects or from their JSON text.

    Raises:
        RecordError: they are neither.
    """
    if isinstance(tools, str) and not tools.strip():
        return None
    tools = from_json_text(tools, "tools")
    if not tools:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise RecordError(f"tools: expected a list of tool descriptions, found {kind_of(tools)}")
    found = [from_json_text(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
    for number, tool in enumerate(found):
        if not isinstance(tool, Mapping):
            raise RecordError(f"tools[{number}]: expected a tool description, found {kind_of(tool)}")
    described = [
        dict(tool) if "function" in tool or "name" not in tool else {"type": "function", "function": dict(tool)}
        for tool in found
    ]
    checked_depth(described, "tools")
    return described


def _message(turn: object, where: str, fields: Mapping[str, str]) -> tuple[Message, bool]:
    """Return one message in OpenAI's form and whether it is a tool call."""
    if not isinstance(turn, Mapping):
        raise RecordError(f"{where}: expected an object with role and content, found {kind_of(turn)}")
    given = _first(turn, fields.get("role"), "role", "from")
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        raise RecordError(f"{where}: unknown role {given!r}; known are {', '.join(sorted(ROLES))}")
    content, thought = _content(_first(turn, fields.get("content"), "content", "value"), where)
    thought = _thought(turn, where) or thought
    calls = _calls(turn, where)
    if content is None and not calls:
        raise RecordError(f"{where}: expected content or tool_calls, found neither")
    is_call = bool(calls) or str(given).strip().lower() in _TOOL_CALL_ROLES
    message: Message = {"role": role, "content": content or ""}
    message |= {key: checked_text(str(turn[key]), where) for key in _KEPT_KEYS if turn.get(key) is not None}
    if role == "assistant":
        if not (is_call or thought or message["content"].strip()):
            raise RecordError(f"{where}: expected the assistant to say something, found an empty text")
        message |= {"reasoning_content": thought} if thought else {}
        message |= {"tool_calls": calls} if calls else {}
    return message, is_call


def _first(turn: Mapping[str, Any], *keys: str | None) -> Any:
    return next((turn[key] for key in keys if key is not None and turn.get(key) is not None), None)


def _thought(turn: Mapping[str, Any], where: str) -> str | None:
    for key in _THOUGHT_KEYS:
        thought = turn.get(key)
        if thought is None or thought == "":
            continue
        if not isinstance(thought, str):
            raise RecordError(f"{where}: expected {key} to be a string, found {kind_of(thought)}")
        return checked_text(thought, where)
    return None


def _content(content: object, where: str) -> tuple[str | None, str | None]:
    """Return a message's text and the thought among its parts; parts of a list are joined."""
    if content is None:
        return None, None
    if isinstance(content, str):
        return checked_text(content, where), None
    if not isinstance(content, Sequence):
        raise RecordError(f"{where}: expected content to be a string or a list of parts, found {kind_of(content)}")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        thinks = kind in ("thinking", "reasoning")
        text = _first(part, "text", str(kind) if thinks else None) if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            found = repr(kind) if isinstance(part, Mapping) else kind_of(part)
            raise RecordError(f"{where}: expected parts of text only, found {found}: only text is captured")
        (thoughts if thinks else texts).append(checked_text(text, where))
    return "".join(texts), "".join(thoughts) or None


def _calls(turn: Mapping[str, Any], where: str) -> list[Message]:
    calls = from_json_text(turn.get("tool_calls"), where)
    if not calls and turn.get("function_call"):
        calls = [turn["function_call"]]
    if not calls:
        return []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise RecordError(f"{where}: expected tool_calls to be a list, found {kind_of(calls)}")
    return [_call(call, where) for call in calls]


def _call(call: object, where: str) -> Message:
    """Return a tool call whose arguments are an object; `ChatTemplate` writes them as a template wants them."""
    if not isinstance(call, Mapping) or not isinstance(call.get("function", call), Mapping):
        raise RecordError(f"{where}: expected tool_calls to be objects, found {kind_of(call)}")
    function = {key: value for key, value in call.get("function", call).items() if key not in ("id", "type")}
    if not isinstance(function.get("name"), str):
        raise RecordError(f"{where}: expected a tool call to name its function, found {kind_of(function.get('name'))}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = decode_json(checked_text(arguments, where).encode() or b"{}")
        except RecordError as error:
            raise RecordError(f"{where}: arguments of a tool call are {error}") from error
    if not isinstance(arguments, Mapping | None):
        raise RecordError(f"{where}: expected arguments of a tool call to be an object, found {kind_of(arguments)}")
    function["arguments"] = {} if arguments is None else dict(arguments)
    checked_depth(function, where)
    return {**{k: v for k, v in call.items() if k == "id"}, "type": "function", "function": function}
