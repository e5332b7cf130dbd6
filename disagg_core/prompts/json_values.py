"""JSON of other people's files, decoded strictly, with a plain word for what is wrong with it.

What Python writes and JSON has not (``NaN``, half a surrogate pair) and what no reader can hold (thousands of nested
lists) is refused: a tokenizer, a template or a file of ours would stumble over it later. Of a key that stands twice the
last value counts, as in every common parser.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

import msgspec

_DEEPEST = 64
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")


class RecordError(ValueError):
    """A record that cannot be used: what was expected and what was found."""


def decode_json(raw: bytes) -> Any:
    """Return the value of `raw`.

    Raises:
        RecordError: it is no JSON, no UTF-8, or nested too deep.
    """
    try:
        return msgspec.json.decode(raw)
    except RecursionError as error:
        raise RecordError("no JSON that can be read: lists or objects are nested too deep") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RecordError(f"no JSON: {_what_is_wrong(raw)}") from error


def _what_is_wrong(raw: bytes) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        return f"invalid UTF-8, byte {raw[error.start]:#04x} at place {error.start + 1}"
    try:
        json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        return f"{error.msg[:1].lower()}{error.msg[1:].removesuffix(' at')} at character {error.pos + 1}"
    except RecordError as error:
        return str(error)
    except RecursionError:
        return "lists or objects are nested too deep"
    half = _SURROGATE.search(text)
    return f"half a surrogate pair, {half[0]}" if half else "a number that is out of range"


def _refuse(constant: str) -> NoReturn:
    raise RecordError(f"{constant} is no JSON number")


def checked_text(value: str, where: str) -> str:
    """Return `value`, which can be written as UTF-8.

    Raises:
        RecordError: it holds half a surrogate pair.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start].encode("unicode_escape").decode()
        raise RecordError(f"{where}: half a surrogate pair, {half}, is no text") from error
    return value


def checked_depth(value: Any, where: str) -> Any:
    """Return `value`, which a chat template can write out.

    Raises:
        RecordError: it is nested deeper than 64 lists or objects, or holds what JSON cannot.
    """
    level = [value]
    for _ in range(_DEEPEST):
        level = [part for item in level for part in _parts(item, where)]
        if not level:
            return value
    raise RecordError(f"{where}: nested deeper than {_DEEPEST} lists or objects")


def _parts(item: object, where: str) -> list[Any]:
    if isinstance(item, dict):
        return [*item, *item.values()]
    if isinstance(item, list):
        return item
    if isinstance(item, str):
        checked_text(item, where)
    elif isinstance(item, float) and (item != item or item in (float("inf"), float("-inf"))):
        raise RecordError(f"{where}: {item} is no JSON number")
    elif item is not None and not isinstance(item, (bool, int, float)):
        raise RecordError(f"{where}: expected JSON, found {type(item).__name__}")
    return []


def from_json_text(value: object, where: str) -> Any:
    """Return `value`, decoded where it is the text of a JSON list or object: tables hold nested values so.

    Raises:
        RecordError: it begins as one and is no JSON.
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return decode_json(checked_text(value, where).encode())
    except RecordError as error:
        raise RecordError(f"{where}: {error}") from error


def kind_of(value: object) -> str:
    """Return what `value` is in words of JSON."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
