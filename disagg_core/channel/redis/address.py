"""Redis addresses: taking them apart, connecting, and finding out which channels a server holds."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import msgspec
import redis
from pydantic import SecretStr
from redis.backoff import NoBackoff
from redis.retry import Retry

from disagg_core.errors import BadInput, ChannelUnavailable

SOCKET_TIMEOUT_S = 1.0
"""A server that is silent for so long is tried anew: a process that is asked to stop has to hear of it meanwhile."""
PREFIX = "draftline:"
_NAME = re.compile(r"[A-Za-z0-9._/:-]+")
_T = TypeVar("_T")


def keys_of(name: str) -> dict[str, str]:
    """Return the keys of a channel by role. The braces keep them together on one node of a cluster."""
    return {role: f"{PREFIX}{{{name}}}:{role}" for role in ("refs", "ids", "meta", "cursor", "writer", "reader")}


class RedisAddress(msgspec.Struct, frozen=True):
    """A ``redis://`` address, taken apart: what the client connects to, the channel's name, what may be shown."""

    url: str
    name: str | None
    shown: str

    @classmethod
    def parse(cls, url: str) -> RedisAddress:
        """Parse ``redis[s]://[user[:password]@]host[:port][/db][?channel=name]``.

        Raises:
            BadInput: it is not of that form. A password is never part of the message.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or 6379
        except ValueError as error:
            raise BadInput(f"the channel's address has no valid host and port: {error}") from None
        shown = f"{parts.scheme}://{host}:{port}{parts.path or '/0'}"
        query = parse_qs(parts.query, keep_blank_values=True)
        name = query.pop("channel", [None])[0]
        if not host or query or not re.fullmatch(r"(/\d*)?", parts.path):
            raise BadInput(f"expected redis://host:port/db, with ?channel=name at most, found {shown}?{parts.query}")
        if name is not None and not _NAME.fullmatch(name):
            raise BadInput(f"expected a channel name of letters, digits and ._/:- , found {name!r}")
        return cls(parts._replace(query="").geturl(), name, shown)


def connect(address: RedisAddress, *, password: SecretStr | None, ca: Path | None) -> redis.Redis:
    """Return a client for the address. Nothing is sent yet.

    Raises:
        BadInput: `ca` was given for a connection without TLS, or is no file.
    """
    options: dict[str, Any] = {}
    if ca is not None:
        if not address.url.startswith("rediss:"):
            raise BadInput(f"a CA certificate is set, but {address.shown} does not use TLS; write rediss://")
        if not ca.is_file():
            raise BadInput(f"the CA certificate {ca} is no file")
        options["ssl_ca_certs"] = str(ca)
    if password is not None:
        options["password"] = password.get_secret_value()
    return redis.Redis.from_url(
        address.url,
        protocol=2,
        socket_timeout=SOCKET_TIMEOUT_S,
        socket_connect_timeout=SOCKET_TIMEOUT_S,
        socket_keepalive=True,
        retry=Retry(NoBackoff(), 0),  # retried by the backend, with a deadline
        **options,
    )


def answered(where: str, command: Callable[[], _T]) -> _T:
    """Send a command and turn what redis-py raises into our errors.

    Raises:
        BadInput: the server refuses us, or is none that can hold a channel.
        ChannelUnavailable: it does not answer, has no memory left, or is in the middle of a fail-over.
    """
    try:
        return command()
    except _REFUSED as error:
        raise BadInput(f"{where} refused us: {error}; set DRAFTLINE_REDIS_PASSWORD, or check its rights") from error
    except (redis.ConnectionError, redis.TimeoutError, redis.exceptions.OutOfMemoryError) as error:
        raise ChannelUnavailable(f"{where} cannot be used: {error}; check the server and the way to it") from error
    except redis.ResponseError as error:
        if isinstance(error, _FAILING_OVER) or _FAIL_OVER_WORDS.search(str(error)):
            raise ChannelUnavailable(f"{where} takes no commands at present: {error}; does it fail over?") from error
        raise BadInput(f"{where} does not do what a channel needs: {error}") from error


def check_server(url: str, *, password: SecretStr | None, ca: Path | None) -> None:
    """Ask the server at `url` once for an answer.

    Raises:
        BadInput: the address is none, or its server refuses us.
        ChannelUnavailable: the server does not answer.
    """
    address = RedisAddress.parse(url)
    client: Any = connect(address, password=password, ca=ca)
    try:
        answered(address.shown, client.ping)
    finally:
        client.close()


_REFUSED = (
    redis.AuthenticationError,  # a ConnectionError too, but no retry will help
    redis.exceptions.AuthorizationError,
    redis.exceptions.NoPermissionError,
)


_FAILING_OVER = (
    redis.exceptions.ReadOnlyError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.MasterDownError,
    redis.exceptions.TryAgainError,
)
_FAIL_OVER_WORDS = re.compile(
    r"\b(READONLY|MISCONF|NOREPLICAS|MASTERDOWN|CLUSTERDOWN|LOADING|TRYAGAIN|UNBLOCKED|BUSY|INPROG|OOM)\b"
    r"|(?i:connection (timed out|refused|reset)|upstream failure|no upstream host)"
)
"""What a server says that will take the same command later; inside the message where it comes out of a script.

The small letters are those of proxies before a server that is away.
"""


def channel_names(address: RedisAddress, *, password: SecretStr | None, ca: Path | None) -> list[str]:
    """Return the names of the channels on a server."""
    client: Any = connect(address, password=password, ca=ca)
    try:
        keys: list[bytes] = answered(address.shown, lambda: list(client.scan_iter(f"{PREFIX}{{*}}:*", count=1000)))
    finally:
        client.close()
    return sorted({key.decode().partition("{")[2].partition("}")[0] for key in keys})


def channel_documents(address: RedisAddress, name: str, *, password: SecretStr | None, ca: Path | None) -> list[bytes]:
    """Return the framed documents of a channel that say whose it is: its cursor and its claims."""
    client: Any = connect(address, password=password, ca=ca)
    keys = keys_of(name)
    try:
        found: list[bytes | None] = [
            answered(address.shown, lambda: client.get(keys["cursor"])),
            answered(address.shown, lambda: client.hget(keys["writer"], "status")),
            answered(address.shown, lambda: client.hget(keys["reader"], "status")),
        ]
    finally:
        client.close()
    return [document for document in found if document is not None]
