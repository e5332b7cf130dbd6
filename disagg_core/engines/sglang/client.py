"""HTTP to one SGLang server: health, continuation, capture and probe; says whose fault a failure is.

What the server did not manage is a `ServerFailure` (the circuit breaker counts it), an answer that makes no sense
included; what it declined to do for this prompt is a `PromptRefused`. Safe for use from several threads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TypeVar

import httpx
import msgspec

from disagg_core.engines.servers.contract import PromptRefused, ServerBusy, ServerFailure, ServerUnreachable
from disagg_core.engines.servers.wire import (
    WIRE_KEY,
    CaptureOrder,
    Order,
    ProbeOrder,
    ProbeReply,
    RefusedReply,
    Reply,
    StoredReply,
    encode_order,
    find_reply,
)
from disagg_core.errors import TargetError

_CONNECT_TIMEOUT_S = 10.0
_REFUSALS = frozenset({400, 413, 422})
"""What a server answers to a prompt it will not run. Any other error is the server's, or of a proxy before it."""

_BUSY = frozenset({429, 503})
"""What a server or a proxy before it answers that has too much to do: nothing was tried."""

_ELSEWHERE = frozenset({401, 403, 404, 405, 407})
"""What somebody answers who does not run prompts for us, whatever the prompt: nothing was tried."""

_Body = TypeVar("_Body")


class _FinishReason(msgspec.Struct):
    type: str | None = None
    message: Any = None


class _MetaInfo(msgspec.Struct, rename={"entries": WIRE_KEY}):
    finish_reason: _FinishReason | None = None
    entries: list[str | None] | None = None


class _Answer(msgspec.Struct):
    """What is read of an answer to ``/generate``."""

    meta_info: _MetaInfo
    output_ids: list[int] | None = None


class _Scheduler(msgspec.Struct):
    memory_usage: dict[str, Any]


class _ServerInfo(msgspec.Struct):
    """What is read of an answer to ``/server_info``."""

    max_total_num_tokens: float
    internal_states: list[_Scheduler]


class SglangClient:
    """One server. `timeout_s` bounds each request; connections are kept and reused."""

    def __init__(self, name: str, url: str, *, timeout_s: float) -> None:
        self.name = name
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._clock_ahead_s = 0.0
        self._http = self._connect()

    def _connect(self) -> httpx.Client:
        timeout = httpx.Timeout(self._timeout_s, connect=min(_CONNECT_TIMEOUT_S, self._timeout_s))
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        return httpx.Client(base_url=self.url, timeout=timeout, limits=limits, trust_env=False)

    def healthy(self, timeout_s: float) -> bool:
        """Tell whether the server generates at present; it can say no for 20 s after its start."""
        try:
            return self._http.get("/health", timeout=timeout_s).status_code == 200
        except (httpx.HTTPError, RuntimeError):  # RuntimeError: closed under us
            return False

    def probe(self, input_ids: Sequence[int]) -> ProbeReply:
        """Capture `input_ids` without storing and return the states with what the server says about itself.

        Also sets what `server_time` goes by.

        Raises:
            TargetError: the server does not capture: no plugin, another version of it, or wrong flags.
            ServerFailure: it did not answer.
        """
        try:
            reply = self._order(input_ids, ProbeOrder())
        except PromptRefused as refused:
            raise TargetError(f"{self.name} ({self.url}) does not capture: {refused}") from refused
        if isinstance(reply, RefusedReply):
            raise TargetError(f"{self.name} ({self.url}) does not capture: {reply.reason}")
        if not isinstance(reply, ProbeReply):
            raise ServerFailure(f"expected the states of a probe from {self.name}, found a {type(reply).__name__}")
        self._clock_ahead_s = reply.now - time.monotonic()
        return reply

    def server_time(self, in_s: float) -> float:
        """Return what the server's monotonic clock will read in `in_s` seconds, known from its last probe.

        Early by as long as the probe's reply was under way, never late.
        """
        return time.monotonic() + self._clock_ahead_s + in_s

    def capture(self, input_ids: Sequence[int], order: CaptureOrder) -> StoredReply:
        """Have the server write the states of `input_ids` to the store as `order` says.

        Raises:
            PromptRefused: there is no sample; nothing is stored.
            ServerBusy: likewise, because the server could not keep up.
            ServerFailure: it is not known whether something was stored.
        """
        reply = self._order(input_ids, order)
        if isinstance(reply, RefusedReply) and reply.store:
            raise ServerFailure(f"{self.name} cannot write to the store: {reply.reason}")
        if isinstance(reply, RefusedReply) and reply.busy:
            raise ServerBusy(f"{self.name} is behind: {reply.reason}")
        if isinstance(reply, RefusedReply):
            raise PromptRefused(reply.reason, retryable=reply.retryable)
        if not isinstance(reply, StoredReply):
            raise ServerFailure(f"expected a stored sample from {self.name}, found a {type(reply).__name__}")
        ref = reply.ref
        if (ref.sample_id, ref.num_tokens) != (order.sample_id, order.num_tokens):
            raise ServerFailure(
                f"expected sample {order.sample_id} of {order.num_tokens} tokens from {self.name}, found "
                f"{ref.sample_id} of {ref.num_tokens}"
            )
        return reply

    def generate(self, input_ids: Sequence[int], sampling: dict[str, Any]) -> list[int]:
        """Return the continuation of `input_ids`; `sampling` are SGLang's sampling parameters.

        Raises:
            PromptRefused: the server will not run this prompt.
            ServerFailure: it did not answer.
        """
        answer = self._post({"input_ids": list(input_ids), "sampling_params": sampling})
        if answer.output_ids is None:
            raise ServerFailure(f"{self.name} answered without output_ids")
        return answer.output_ids

    def memory(self) -> dict[str, float]:
        """Return the server's memory in GiB by use (weights, KV cache), and its token capacity.

        Raises:
            ServerFailure: it did not answer.
        """
        try:
            response = self._http.get("/server_info")
            response.raise_for_status()
        except httpx.HTTPError as error:
            raise ServerFailure(f"{self.name}: {_describe(error)}") from error
        info = self._read(response, _ServerInfo)
        usage = {"max_total_tokens": info.max_total_num_tokens}
        for state in info.internal_states[:1]:
            usage |= {name: value for name, value in state.memory_usage.items() if isinstance(value, (int, float))}
        return usage

    def reset(self) -> None:
        """Drop all connections, so that nothing of a server that was replaced is reused."""
        old, self._http = self._http, self._connect()
        old.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def _order(self, input_ids: Sequence[int], order: Order) -> Reply:
        sampling = {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True, "custom_params": encode_order(order)}
        answer = self._post({"input_ids": list(input_ids), "return_hidden_states": True, "sampling_params": sampling})
        try:
            reply = find_reply(answer.meta_info.entries)
        except msgspec.DecodeError as error:
            raise TargetError(
                f"{self.name} ({self.url}): the capture plugin's reply cannot be read ({error}); install the same "
                "draftline version there as here"
            ) from error
        if reply is None:
            raise TargetError(
                f"{self.name} ({self.url}) runs without the capture plugin; install draftline in its environment "
                "(infra/sglang/setup.sh) and look for 'draftline_capture' in its log"
            )
        return reply

    def _post(self, body: dict[str, Any]) -> _Answer:
        try:
            response = self._http.post("/generate", json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ServerUnreachable(f"{self.name}: {_describe(error)}") from error
        except (httpx.HTTPError, RuntimeError) as error:  # RuntimeError: closed under us by reset()
            raise ServerFailure(f"{self.name}: {_describe(error)}") from error
        if response.status_code in _REFUSALS:
            raise PromptRefused(f"{self.name} answered {response.status_code}: {_said(response)}", retryable=False)
        if response.status_code in _BUSY:
            raise ServerBusy(f"{self.name} answered {response.status_code}: {_said(response)}")
        if response.status_code in _ELSEWHERE:
            raise ServerUnreachable(
                f"{self.name} answered {response.status_code}: {_said(response)}; it wants a key, or {self.url} is no "
                "server of ours"
            )
        if response.status_code != 200:
            raise ServerFailure(f"{self.name} answered {response.status_code}: {_said(response)}")
        answer = self._read(response, _Answer)
        finish = answer.meta_info.finish_reason
        if finish is not None and finish.type == "abort":
            raise ServerFailure(f"{self.name} aborted the request: {finish.message}")
        return answer

    def _read(self, response: httpx.Response, kind: type[_Body]) -> _Body:
        try:
            return msgspec.json.decode(response.content, type=kind)
        except (ValueError, RecursionError) as error:  # what msgspec raises is a ValueError
            found = response.content[:100].decode(errors="backslashreplace")
            raise ServerFailure(f"{self.name} answered what cannot be read ({error}): {found!r}") from error


def _describe(error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException):
        return f"no answer in time ({type(error).__name__})"
    return f"{type(error).__name__}: {error}"


def _said(response: httpx.Response) -> str:
    """Return the message of an error response, short."""
    try:
        body = msgspec.json.decode(response.content)
    except (ValueError, RecursionError):
        return response.text[:300]
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:300]
