"""Answers that make no sense: whatever comes back, the client gives a value of the right type or a named error."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disagg_core.contracts import FeatureSpec, SampleRef
from disagg_core.engines.servers.contract import PromptRefused, ServerFailure
from disagg_core.engines.servers.probe import Reference, compare_states
from disagg_core.engines.servers.wire import (
    WIRE_KEY,
    CaptureOrder,
    ProbeReply,
    RefusedReply,
    Reply,
    ServerFacts,
    StoredReply,
    encode_reply,
)
from disagg_core.engines.sglang.client import SglangClient
from disagg_core.errors import TargetError
from disagg_core.target.facts import TargetFacts
from tests.unit.engines.kit import ADDRESS, CAPTURE, IDENTITY

pytestmark = pytest.mark.unit

ORDER = CaptureOrder(
    sample_id="s000000001",
    source_task_id="p:1",
    server="sglang-0",
    fingerprint="f",
    num_tokens=3,
    loss_spans=[(1, 3)],
    identity=IDENTITY,
    store=ADDRESS,
    deadline=1e9,
)
REF = SampleRef(
    sample_id="s000000001",
    run_id="run",
    attempt=1,
    source_task_id="p:1",
    feature_store_uri="mooncake://h:1/run/1",
    key="run/1/s000000001/x",
    size_bytes=64,
    crc32=None,
    feature_specs={},
    strategy="eagle3",
    schema_version=1,
    target_model_version="v",
    draft_weight_version=0,
    tokenizer_version="k",
    vocab_map_version="m",
    num_tokens=3,
)
FACTS = ServerFacts(
    sglang_version="0.5.23",
    model_path="/m",
    revision=None,
    fingerprint="f",
    model_type="llama",
    num_layers=6,
    hidden_size=4,
    vocab_size=100,
    dtype="float32",
    aux_layers=[0, 2, 4],
    context_length=64,
    tensor_parallel=1,
    settings={},
)
STORED = StoredReply(ref=REF, copy_s=0.0, put_s=0.0)
PROBED = ProbeReply(facts=FACTS, now=5e6, tensors={}, data=b"")
REPLIES: tuple[Reply, ...] = (STORED, PROBED, RefusedReply(reason="rows", retryable=False))


@pytest.fixture
def server(scripted: Callable[[], Any]) -> Any:
    return scripted()


@pytest.fixture
def client(server: Any) -> Iterator[SglangClient]:
    opened = SglangClient("sglang-0", server.url, timeout_s=10.0)
    yield opened
    opened.close()


def answer_of(reply: Reply) -> dict[str, Any]:
    return {
        "text": "",
        "output_ids": [7],
        "meta_info": {"finish_reason": {"type": "length", "length": 1}, WIRE_KEY: [None, encode_reply(reply)]},
    }


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def paths_in(value: Any) -> list[tuple[Any, ...]]:
    """Return the path to every value within `value`."""
    if not isinstance(value, (dict, list)):
        return []
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    return [(key, *rest) for key, inner in items for rest in [(), *paths_in(inner)]]


def changed_at(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    copied = json.loads(json.dumps(value))
    parent = copied
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return copied


@st.composite
def damaged(draw: st.DrawFn, whole: Any) -> Any:
    """`whole` with one value, at any depth, taken out or put in place of by something else."""
    path = draw(st.sampled_from(paths_in(whole)))
    other = draw(st.none() | json_values)
    remove = draw(st.booleans())

    def change(parent: Any, key: Any) -> None:
        if remove:
            del parent[key]
        else:
            parent[key] = other

    return changed_at(whole, path, change)


@st.composite
def damaged_answers(draw: st.DrawFn) -> bytes:
    """An answer of SGLang's with something wrong in it, in the plugin's part or around it, or cut off."""
    reply = draw(st.sampled_from(REPLIES))
    whole = answer_of(reply)
    if draw(st.booleans()):
        inner = draw(damaged(json.loads(encode_reply(reply))))
        whole["meta_info"][WIRE_KEY][1] = json.dumps(inner)
    else:
        whole = draw(damaged(whole))
    body = json.dumps(whole).encode()
    return body[: draw(st.integers(0, len(body)))] if draw(st.booleans()) else body


bodies = st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()) | damaged_answers()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(status=st.sampled_from([200, 200, 200, 400, 404, 500]), body=bodies)
def test_whatever_comes_back_is_a_value_of_its_type_or_a_named_error(
    server: Any, client: SglangClient, status: int, body: bytes
) -> None:
    server.answer = lambda request: (status, body)
    server.info = body

    def asked(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (ServerFailure, PromptRefused, TargetError):
            return None

    tokens = asked(lambda: client.generate([1, 2], {}))
    assert tokens is None or all(type(token) is int for token in tokens)
    stored = asked(lambda: client.capture([1, 2, 3], ORDER))
    assert stored is None or (stored.ref.sample_id, stored.ref.num_tokens) == ("s000000001", 3)
    probed = asked(lambda: client.probe([1, 2]))
    assert probed is None or isinstance(probed, ProbeReply)
    usage = asked(client.memory)
    assert usage is None or all(isinstance(value, (int, float)) for value in usage.values())


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"<html>504 Gateway Time-out</html>", id="a proxy's page"),
        pytest.param(b"[1, 2]", id="another type"),
        pytest.param(b'{"output_ids": [7]}', id="no meta_info"),
        pytest.param(b'{"output_ids": ["7"], "meta_info": {}}', id="tokens as text"),
        pytest.param(b'{"output_ids": [7], "meta_info": {"finish_reason": "abort"}}', id="a reason of another type"),
        pytest.param(b'{"output_ids": [7], "meta_info": {}', id="cut off"),
        pytest.param(b'"\xff"', id="no unicode"),
        pytest.param(b"[" * 100_000, id="too deep"),
    ],
)
def test_an_answer_that_cannot_be_read_is_the_servers_fault(server: Any, client: SglangClient, body: bytes) -> None:
    server.answer = lambda request: (200, body)

    with pytest.raises(ServerFailure, match="sglang-0 answered what cannot be read"):
        client.generate([1, 2], {})


def test_an_answer_without_tokens_is_the_servers_fault(server: Any, client: SglangClient) -> None:
    server.answer = lambda request: (200, {"meta_info": {}})

    with pytest.raises(ServerFailure, match="sglang-0 answered without output_ids"):
        client.generate([1, 2], {})


def test_a_reference_to_another_sample_is_the_servers_fault(server: Any, client: SglangClient) -> None:
    other = msgspec.structs.replace(STORED, ref=msgspec.structs.replace(REF, sample_id="s000000002"))
    server.answer = lambda request: (200, answer_of(other))

    with pytest.raises(ServerFailure, match="expected sample s000000001 of 3 tokens from sglang-0, found s000000002"):
        client.capture([1, 2, 3], ORDER)


def test_a_reply_to_another_order_is_the_servers_fault(server: Any, client: SglangClient) -> None:
    server.answer = lambda request: (200, answer_of(STORED))

    with pytest.raises(ServerFailure, match="expected the states of a probe from sglang-0, found a StoredReply"):
        client.probe([1, 2])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(-2, 2**70), max_size=3) | st.just([3, 4]),
    dtype=st.sampled_from(["float32", "int8", "object", ""]),
    offset=st.integers(-5, 2**70) | st.just(0),
    nbytes=st.integers(-5, 2**70) | st.just(48),
    data=st.binary(max_size=143) | st.just(bytes(144)),
    named=st.booleans(),
)
def test_states_are_compared_or_said_to_be_unreadable(
    facts: TargetFacts, shape: list[int], dtype: str, offset: int, nbytes: int, data: bytes, named: bool
) -> None:
    aux = FeatureSpec(shape=(3, 12), dtype="float32", offset=0, nbytes=144)
    last = FeatureSpec(shape=tuple(shape), dtype=dtype, offset=offset, nbytes=nbytes)
    tensors = {"aux_hidden_states": aux, "last_hidden_state" if named else "other": last}
    reply = msgspec.structs.replace(PROBED, tensors=tensors, data=data)
    reference = Reference([1, 2, 3], {0: torch.zeros(3, 4)}, torch.zeros(3, 4))

    try:
        compared = [entry.name for entry in compare_states(reply, facts, CAPTURE, reference)]
    except TargetError as error:
        compared = [str(error)[:18]]

    assert compared in (["output of layer 0", "last hidden state"], ["the probe's states"])


def test_deadlines_are_told_in_the_servers_own_time(server: Any, client: SglangClient) -> None:
    """The clocks of two machines have nothing in common; the probe says what the server's reads."""
    server.answer = lambda request: (200, answer_of(PROBED))
    before = time.monotonic()
    client.probe([1, 2])

    told = client.server_time(60.0)

    assert PROBED.now + 60 <= told <= PROBED.now + 60 + (time.monotonic() - before)
