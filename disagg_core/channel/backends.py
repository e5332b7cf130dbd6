"""Which backend an address names."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from pydantic import SecretStr

from disagg_core.channel.contract import ChannelBackend
from disagg_core.channel.file.backend import FileBackend
from disagg_core.channel.redis.backend import RedisBackend
from disagg_core.errors import BadInput


def directory_of(url: str | Path) -> Path | None:
    """Return the directory that an address names; None if it names a server.

    Raises:
        BadInput: the address has an unknown scheme, or a ``file:`` address names a host.
    """
    if isinstance(url, Path):
        return url
    scheme, separator, _ = url.partition(":")
    if not separator or "/" in scheme:
        return Path(url)
    if scheme in ("redis", "rediss"):
        return None
    if scheme != "file":
        raise BadInput(f"expected a directory, file:/dir, redis://host:port/db or rediss://..., found {url!r}")
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise BadInput(f"expected file:/dir or file:///dir, found {url!r}")
    return Path(unquote(parts.path))


def open_backend(
    url: str | Path, *, run_id: str, attempt: int, password: SecretStr | None = None, ca: Path | None = None
) -> ChannelBackend:
    """Return the backend for an address.

    Raises:
        BadInput: the address is none, or has settings that cannot take effect.
    """
    directory = directory_of(url)
    if directory is not None:
        return FileBackend(directory.absolute(), run_id=run_id, attempt=attempt)
    return RedisBackend(str(url), run_id=run_id, attempt=attempt, password=password, ca=ca)
