"""Whose fault a failure is: the prompt's, the server's, or a server that is not what it should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from disagg_core.engines.servers.contract import PromptRefused, ServerFailure, ServerUnreachable
from disagg_core.engines.servers.wire import WIRE_KEY, RefusedReply, encode_reply
from disagg_core.engines.sglang.client import SglangClient
from disagg_core.errors import TargetError

pytestmark = pytest.mark.unit


@pytest.fixture
def server(scripted: Callable[[], Any]) -> Any:
    return scripted()


@pytest.fixture
def client(server: Any) -> Iterator[SglangClient]:
    opened = SglangClient("sglang-0", server.url, timeout_s=1.0)
    yield opened
    opened.close()


@pytest.mark.parametrize("status", [500, 502, 503, 429, 404, 401, 302])
def test_the_server_broke(server: Any, client: SglangClient, status: int) -> None:
    server.answer = lambda body: (status, {"error": {"message": "out of memory"}})

    with pytest.raises(ServerFailure, match=f"sglang-0 answered {status}: out of memory"):
        client.generate([1, 2], {})


def test_the_server_declined_the_prompt(server: Any, client: SglangClient) -> None:
    server.answer = lambda body: (400, {"error": {"message": "The input (400 tokens) is longer"}})

    with pytest.raises(PromptRefused, match=r"The input \(400 tokens\) is longer") as refused:
        client.generate([1, 2], {})
    assert not refused.value.retryable


def test_the_server_hangs(server: Any, client: SglangClient) -> None:
    server.answer = lambda body: (200, {"late": server.release.wait(10)})

    with pytest.raises(ServerFailure, match="no answer in time"):
        client.generate([1, 2], {})


def test_nobody_listens() -> None:
    client = SglangClient("sglang-0", "http://127.0.0.1:9", timeout_s=1.0)

    assert not client.healthy(1.0)
    with pytest.raises(ServerUnreachable, match="sglang-0: ConnectError"):
        client.generate([1, 2], {})
    client.close()


def test_an_aborted_request_is_the_servers_fault(server: Any, client: SglangClient) -> None:
    server.answer = lambda body: (200, {"meta_info": {"finish_reason": {"type": "abort", "message": "shut down"}}})

    with pytest.raises(ServerFailure, match="aborted the request: shut down"):
        client.generate([1, 2], {})


def test_a_server_without_the_plugin_is_named(server: Any, client: SglangClient) -> None:
    with pytest.raises(TargetError, match=r"sglang-0 \(http://.*\) runs without the capture plugin; install draftline"):
        client.probe([1, 2])


def test_a_plugin_of_another_version_is_named(server: Any, client: SglangClient) -> None:
    server.answer = lambda body: (200, {"meta_info": {WIRE_KEY: ['{"type": "stored", "old": 1}']}})

    with pytest.raises(TargetError, match="install the same draftline version"):
        client.probe([1, 2])


def test_a_server_that_does_not_capture_is_named(server: Any, client: SglangClient) -> None:
    refusal = encode_reply(RefusedReply(reason="the server does not capture", retryable=False))
    server.answer = lambda body: (200, {"meta_info": {WIRE_KEY: [refusal]}})

    with pytest.raises(TargetError, match="does not capture: the server does not capture"):
        client.probe([1, 2])
