"""In what two documents differ, place by place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import BaseModel, ConfigDict, JsonValue


class Difference(BaseModel):
    """One place at which two documents differ; None where one of them has nothing."""

    model_config = ConfigDict(frozen=True)

    what: str
    one: JsonValue
    other: JsonValue


def compare(one: Mapping[str, JsonValue], other: Mapping[str, JsonValue]) -> list[Difference]:
    """Return the differences of two documents of plain JSON values, in the order of their keys."""
    return list(_differences("", one, other))


def _differences(where: str, one: Mapping[str, JsonValue], other: Mapping[str, JsonValue]) -> Iterator[Difference]:
    for key in [*one, *(key for key in other if key not in one)]:
        place = f"{where}.{key}" if where else key
        first, second = one.get(key), other.get(key)
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            yield from _differences(place, first, second)
        elif first != second:
            yield Difference(what=place, one=first, other=second)
