"""What every section of the run document is made of: the base class, and the kinds of values that it checks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b?|b)?\s*$", re.IGNORECASE)
_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("", 1000), ("b", 1000), ("i", 1024), ("ib", 1024))
}


def parse_bytes(value: object) -> object:
    """Turn ``"256MiB"`` or ``"4 GB"`` into a number of bytes; other values are left to pydantic."""
    if not isinstance(value, str):
        return value
    match = _SIZE.match(value)
    if not match:
        raise ValueError(f"expected a size such as 256MiB, 4GB or a number of bytes, found {value!r}")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def _without_password(url: str) -> str:
    if urlsplit(url).password:
        raise ValueError(
            "a password was found, and must not stand in the run document, which is stored with the run; set it on "
            "the machines instead: DRAFTLINE_REDIS_PASSWORD for the channel, the storage client's own variables else"
        )
    return url


def _channel_of_every_attempt(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("redis", "rediss") or parts.query:
        raise ValueError(
            f"expected redis://host:port/db or rediss://..., found {url!r}: every attempt gets a channel of its own "
            "there, or in the run's directory without a url"
        )
    return url


def is_local(model: str) -> bool:
    """Tell whether `model` names a directory rather than a Hugging Face id: by how it begins, or by there being one."""
    return model.startswith(("./", "../", "/", "~")) or Path(model).is_dir()


def _ascending(layers: tuple[int, ...]) -> tuple[int, ...]:
    if layers[0] < 0 or list(layers) != sorted(set(layers)):
        raise ValueError(f"expected ascending layer ids from 0, found {list(layers)}")
    return layers


Layers = Annotated[tuple[int, ...], Field(min_length=1), AfterValidator(_ascending)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
SecretFreeUrl = Annotated[str, AfterValidator(_without_password)]
ChannelUrl = Annotated[SecretFreeUrl, AfterValidator(_channel_of_every_attempt)]
RegistryName = Annotated[str, Field(min_length=1, max_length=120, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
RunName = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[a-z0-9][a-z0-9._-]*$")]


class Section(BaseModel):
    """Base of the sections: unknown keys are refused, values are not changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
