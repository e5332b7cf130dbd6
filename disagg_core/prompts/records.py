"""Records of other people's files in any of the known formats, parsed into the plain shapes.

`messages`, `sharegpt` and `turns` become a `Conversation`; `prompt_response` and `alpaca` a `PromptResponse`, or a
conversation where they have a system prompt, tools or lists of messages (TRL's form); `text` a `PlainText`; `tokenized`
a `Tokenized`. What is wrong with a record is said as a `RecordError`; the caller adds file and line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from disagg_core.prompts.json_values import RecordError as RecordError
from disagg_core.prompts.json_values import checked_text, from_json_text, kind_of
from disagg_core.prompts.messages import optional_text, parse_conversation, parse_kwargs, parse_tools
from disagg_core.prompts.shapes import Conversation as Conversation
from disagg_core.prompts.shapes import PlainText as PlainText
from disagg_core.prompts.shapes import PromptResponse as PromptResponse
from disagg_core.prompts.shapes import Record
from disagg_core.prompts.shapes import Tokenized as Tokenized
from disagg_core.prompts.shapes import prompt_key as prompt_key
from disagg_core.run_spec.data import FieldName, Format, FormatOrAuto

_FORMAT_KEYS: tuple[tuple[str, Format], ...] = (
    ("input_ids", "tokenized"),
    ("messages", "messages"),
    ("conversations", "sharegpt"),
    ("conversation", "sharegpt"),
    ("turns", "turns"),
    ("prompt", "prompt_response"),
    ("chosen", "prompt_response"),
    ("instruction", "alpaca"),
    ("text", "text"),
)
_RESPONSE_KEYS = ("response", "completion", "output", "chosen")
_READ_KEYS = frozenset(
    {key for key, _ in _FORMAT_KEYS}
    | {*_RESPONSE_KEYS, "system", "input", "history", "loss_mask", "tools", "chat_template_kwargs"}
)
_OPTIONAL: frozenset[FieldName] = frozenset({"system", "input", "tools", "loss_mask", "role", "content"})
_COMMON_PAIRS = (
    ("question", "answer"), ("query", "response"), ("instruction", "response"), ("input", "output"),
    ("question", "response"), ("input", "target"), ("source", "target"), ("problem", "solution"),
)  # fmt: skip


def detect_format(keys: Mapping[str, Any]) -> Format:
    """Return the format of a record by its keys; those that hold something count first.

    Raises:
        RecordError: it has none of the known keys.
    """
    for there in ({key for key, value in keys.items() if value is not None}, set(keys)):
        for key, format_ in _FORMAT_KEYS:
            if key in there:
                return format_
    known = ", ".join(key for key, _ in _FORMAT_KEYS)
    found = ", ".join(sorted(str(key)[:40] for key in keys)[:12]) or "none"
    raise RecordError(f"expected one of the keys {known}; found {found}{_suggestion(keys)}")


def _suggestion(keys: Iterable[str]) -> str:
    for prompt, response in _COMMON_PAIRS:
        if prompt in keys and response in keys:
            return f"; say which is which with data.fields: {{prompt: {prompt}, response: {response}}}"
    return "; say which is which with data.fields"


def columns_read(columns: Sequence[str], fields: Mapping[FieldName, str]) -> list[str]:
    """Return which `columns` of a table are looked at."""
    wanted = _READ_KEYS | set(fields.values())
    return [column for column in columns if column in wanted]


def parse_record(record: object, format_: FormatOrAuto, fields: Mapping[FieldName, str] | None = None) -> Record:
    """Return `record` in its plain shape; `fields` are the names that it has for what a format expects.

    Raises:
        RecordError: it does not have the format, names an unknown role, or holds nothing.
    """
    if not isinstance(record, Mapping):
        raise RecordError(f"expected a JSON object, found {kind_of(record)}")
    fields = fields or {}
    named = _renamed(record, fields)
    if format_ == "auto":
        format_ = detect_format(named if any(name in fields for name, _ in _FORMAT_KEYS) else {**record, **named})
    return _PARSERS[format_]({**record, **named}, fields)


def _renamed(record: Mapping[str, Any], fields: Mapping[FieldName, str]) -> dict[str, Any]:
    """Return what `record` has under the names of `fields`, under the names that are expected."""
    named: dict[str, Any] = {}
    for name, given in fields.items():
        if name in ("role", "content"):  # of a message, not of the record
            continue
        if given in record:
            named[name] = record[given]
        elif name not in _OPTIONAL:
            found = ", ".join(sorted(str(key)[:40] for key in record)[:12]) or "none"
            raise RecordError(f"expected the key {given!r} (data.fields.{name}); found {found}")
    return named


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise RecordError(f"{key}: expected a string, found {kind_of(value)}")
    if not value.strip():
        raise RecordError(f"{key}: expected some text, found an empty string")
    return checked_text(value, key)


def _prompt_response(record: Mapping[str, Any], fields: Mapping[FieldName, str]) -> Record:
    """Return a prompt with its answer, each a text or a list of messages."""
    key = next((key for key in _RESPONSE_KEYS if record.get(key) is not None), None)
    answer = None if key is None else record[key]
    prompt = record.get("prompt")
    if isinstance(prompt, list) or isinstance(answer, list):
        asked = _as_messages(prompt, "prompt", "user")
        answered = _as_messages(answer, key or "response", "assistant")
        if answered and isinstance(answered[0], Mapping) and asked and answered[0] == asked[0]:
            asked = []  # preference data often has the prompt in the chosen conversation, too
        where = "prompt" if asked else key or "prompt"
        return parse_conversation([*asked, *answered], where, record, {str(k): v for k, v in fields.items()})
    return _pair(_text(record, "prompt"), None if key is None else _text(record, key), record)


def _as_messages(said: object, key: str, role: str) -> list[Any]:
    if said is None:
        return []
    return said if isinstance(said, list) else [{"role": role, "content": _text({key: said}, key)}]


def _pair(prompt: str, response: str | None, record: Mapping[str, Any], before: Sequence[Any] = ()) -> Record:
    """Return prompt and response as such, or as a conversation where more belongs to them."""
    system = optional_text(record, "system")
    tools, kwargs = parse_tools(record.get("tools")), parse_kwargs(record)
    if not (before or system or tools or kwargs):
        return PromptResponse(prompt, response)
    messages = [*before, {"role": "user", "content": prompt}]
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    return parse_conversation(messages, "prompt", record)


def _alpaca(record: Mapping[str, Any], fields: Mapping[FieldName, str]) -> Record:
    """Return instruction and input, a blank line between them, as the prompt; output (or response) as the answer."""
    instruction, more = _text(record, "instruction"), optional_text(record, "input")
    prompt = instruction if more is None else f"{instruction}\n\n{more}"
    key = next((key for key in ("output", "response", "completion") if record.get(key) is not None), None)
    return _pair(prompt, None if key is None else _text(record, key), record, _history(record.get("history")))


def _history(history: object) -> list[dict[str, Any]]:
    pairs = from_json_text(history, "history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise RecordError("history: expected a list of [question, answer]")
    roles = ("user", "assistant")
    return [{"role": role, "content": said} for pair in pairs for role, said in zip(roles, pair, strict=True)]


def _turns(record: Mapping[str, Any], fields: Mapping[FieldName, str]) -> Record:
    """Return the first of a list of questions (Spec-Bench's form); the others need the target's answers."""
    turns = questions_of(record)
    return parse_conversation([{"role": "user", "content": turns[0]}], "turns", record)


def questions_of(record: Mapping[str, Any]) -> list[str]:
    """Return the questions of a record in Spec-Bench's form, in order.

    Raises:
        RecordError: there are none, or one is no text.
    """
    turns = from_json_text(record.get("turns"), "turns")
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"turns: expected a list of questions, found {kind_of(turns) if turns != [] else 'none'}")
    return [_text({f"turns[{number}]": turn}, f"turns[{number}]") for number, turn in enumerate(turns)]


def _tokenized(record: Mapping[str, Any], fields: Mapping[FieldName, str]) -> Tokenized:
    ids = from_json_text(record.get("input_ids"), "input_ids")
    if not isinstance(ids, Sequence) or isinstance(ids, str) or not ids:
        raise RecordError(f"input_ids: expected a list of token ids, found {kind_of(ids) if ids != [] else 'none'}")
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise RecordError("input_ids: expected token ids of 0 and above only")
    mask = from_json_text(record.get("loss_mask"), "loss_mask")
    if mask is None:
        return Tokenized(list(ids), [1] * len(ids))
    if not isinstance(mask, Sequence) or len(mask) != len(ids):
        found = len(mask) if isinstance(mask, Sequence) else kind_of(mask)
        raise RecordError(f"loss_mask: expected {len(ids)} numbers, one for each of input_ids, found {found}")
    if not all(value in (0, 1) for value in mask):
        raise RecordError("loss_mask: expected 0 and 1 only")
    return Tokenized(list(ids), [int(value) for value in mask])


def _listed(key: str) -> Callable[[Mapping[str, Any], Mapping[FieldName, str]], Record]:
    def parse(record: Mapping[str, Any], fields: Mapping[FieldName, str]) -> Record:
        found = next((name for name in (key, key.removesuffix("s")) if record.get(name) is not None), key)
        return parse_conversation(record.get(found), found, record, {str(k): v for k, v in fields.items()})

    return parse


_PARSERS: dict[Format, Callable[[Mapping[str, Any], Mapping[FieldName, str]], Record]] = {
    "messages": _listed("messages"),
    "sharegpt": _listed("conversations"),
    "prompt_response": _prompt_response,
    "alpaca": _alpaca,
    "turns": _turns,
    "text": lambda record, fields: PlainText(_text(record, "text")),
    "tokenized": _tokenized,
}
