"""What an engine's HTTP client is to the pool and the target over it, and whose fault a failure is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from disagg_core.engines.servers.wire import CaptureOrder, ProbeReply, StoredReply
from disagg_core.errors import DraftlineError, Transient


class ServerFailure(Transient):
    """The server did not answer, answered that something broke inside it, or answered what makes no sense."""

    failure_class = "target_unavailable"


class ServerUnreachable(ServerFailure):
    """Nobody took the request: whatever it asked for was not tried."""


class ServerBusy(ServerFailure):
    """The server has more than it can do at present; whatever it was asked for, nothing of it is left there."""


class PromptRefused(DraftlineError):
    """The server answered that it will not run this prompt; `retryable`: another server may.

    `own_form`: nobody was asked, the prompt's own form says it.
    """

    def __init__(self, message: str, *, retryable: bool, own_form: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.own_form = own_form


class ServerClient(Protocol):
    """One server, over HTTP. Safe for use from several threads."""

    name: str
    url: str

    def healthy(self, timeout_s: float) -> bool:
        """Tell whether the server generates at present."""
        ...

    def probe(self, input_ids: Sequence[int]) -> ProbeReply:
        """Capture `input_ids` without storing and return the states with what the server says about itself.

        Raises:
            TargetError: the server does not capture.
            ServerFailure: it did not answer.
        """
        ...

    def server_time(self, in_s: float) -> float:
        """Return what the server's monotonic clock will read in `in_s` seconds, as the last probe said."""
        ...

    def capture(self, input_ids: Sequence[int], order: CaptureOrder) -> StoredReply:
        """Have the server write the states of `input_ids` to the store as `order` says.

        Raises:
            PromptRefused: there is no sample; nothing is stored.
            ServerBusy: there is none because the server could not keep up; nothing is stored.
            ServerFailure: it is not known whether something was stored.
        """
        ...

    def generate(self, input_ids: Sequence[int], sampling: dict[str, Any]) -> list[int]:
        """Return the continuation of `input_ids`; `sampling` are the engine's own sampling parameters.

        Raises:
            PromptRefused: the server will not run this prompt.
            ServerFailure: it did not answer.
        """
        ...

    def reset(self) -> None:
        """Drop all connections, so that nothing of a server that was replaced is reused."""
        ...

    def close(self) -> None:
        """Close all connections."""
        ...
