"""The recorder inside a server: what it stores, what it refuses, and when a reply may go out."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from disagg_core.contracts import Capture, RunIdentity, SampleRef
from disagg_core.engines.servers.recorder import Recorder, Recording
from disagg_core.engines.servers.wire import (
    WIRE_KEY,
    CaptureOrder,
    ProbeOrder,
    ProbeReply,
    RefusedReply,
    ServerFacts,
    StoreAddress,
    StoredReply,
    find_reply,
)
from disagg_core.errors import StoreFull
from disagg_core.store.outgoing import Shapes, allocate_plain
from disagg_core.store.packing import plan_layout, unpack
from disagg_core.target.layers import LayerStates
from tests.kit.waiting import eventually
from tests.unit.engines.kit import ADDRESS, IDENTITY

pytestmark = pytest.mark.unit

HIDDEN = 4
FACTS = ServerFacts(
    sglang_version="0.5.23",
    model_path="/models/target",
    revision=None,
    fingerprint="f",
    model_type="llama",
    num_layers=6,
    hidden_size=HIDDEN,
    vocab_size=100,
    dtype="float32",
    aux_layers=[0, 2, 4],
    context_length=64,
    tensor_parallel=1,
    settings={},
)


class Shelf:
    """Stands where the store's client stands: the recorder's rules are tested without a store process."""

    def __init__(self) -> None:
        self.samples: dict[str, dict[str, Tensor]] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.full = False
        self.closed = False

    def allocate(self, shapes: Shapes, filled_from: torch.device) -> Mapping[str, Tensor]:
        return allocate_plain(shapes, filled_from)

    def put(
        self,
        sample_id: str,
        tensors: Mapping[str, Tensor],
        *,
        identity: RunIdentity,
        source_task_id: str,
        num_tokens: int,
        metadata: Mapping[str, Any] | None = None,
    ) -> SampleRef:
        assert self.gate.wait(60)
        if self.full:
            raise StoreFull("no room")
        self.samples[sample_id] = dict(tensors)
        return SampleRef(
            sample_id=sample_id,
            run_id=identity.run_id,
            attempt=identity.attempt,
            source_task_id=source_task_id,
            feature_store_uri="mooncake://h:1/run/1",
            key=f"run/1/{sample_id}/x",
            size_bytes=64,
            crc32=None,
            feature_specs=plan_layout(tensors).specs,
            strategy=identity.strategy,
            schema_version=1,
            target_model_version=identity.target_model_version,
            draft_weight_version=identity.draft_weight_version,
            tokenizer_version=identity.tokenizer_version,
            vocab_map_version=identity.vocab_map_version,
            num_tokens=num_tokens,
            metadata=dict(metadata or {}),
        )

    def abort(self, ref: SampleRef) -> None:
        del self.samples[ref.sample_id]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def recorder(shelf: Shelf) -> Recorder:
    return Recorder(lambda _address: shelf, clock=lambda: 100.0)


def order_of(tokens: int, **changes: Any) -> CaptureOrder:
    fields: dict[str, Any] = {
        "sample_id": "s000000001",
        "source_task_id": "prompts:1",
        "server": "sglang-0",
        "fingerprint": "f",
        "num_tokens": tokens,
        "loss_spans": [(1, tokens)],
        "identity": IDENTITY,
        "store": ADDRESS,
        "deadline": 200.0,
    }
    return CaptureOrder(**{**fields, **changes})


def states(rows: int, fill: float = 1.0) -> tuple[Tensor, Tensor]:
    return torch.full((rows, 3 * HIDDEN), fill), torch.full((rows, HIDDEN), fill)


def capture(recorder: Recorder, order: CaptureOrder | ProbeOrder, tokens: int, *chunks: int) -> Recording:
    recording = Recording(order)
    for number, rows in enumerate(chunks):
        aux, last = states(rows, float(number))
        recorder.collect(recording, aux=aux, last=last)
    recorder.finish(recording, list(range(tokens)), lambda: FACTS)
    return recording


def settled(recorder: Recorder, recording: Recording) -> Any:
    """Hold the reply as the server does, until it may go out, and read it as the producer does."""
    request = SimpleNamespace(rid="r", origin_input_ids=[], customized_info=None)

    def may_go() -> bool:
        if not recorder.hold(recording, request, "streamer"):
            return True
        recorder.wait(0.05)
        recorder.released()
        return False

    eventually(may_go)
    return find_reply(request.customized_info[WIRE_KEY])


def test_chunks_become_one_sample_and_the_reply_its_reference(recorder: Recorder, shelf: Shelf) -> None:
    reply = settled(recorder, capture(recorder, order_of(5), 5, 2, 3))

    assert isinstance(reply, StoredReply)
    sample = shelf.samples["s000000001"]
    assert list(sample) == ["input_ids", "loss_mask", "aux_hidden_states", "last_hidden_state"]
    assert sample["input_ids"].tolist() == [0, 1, 2, 3, 4]
    assert sample["input_ids"].dtype == torch.int32
    assert sample["loss_mask"].tolist() == [0, 1, 1, 1, 1]
    assert sample["last_hidden_state"][:, 0].tolist() == [0, 0, 1, 1, 1]
    assert reply.ref.num_tokens == 5
    assert reply.ref.metadata["server"] == "sglang-0"


def test_a_sample_holds_what_is_wanted_of_what_the_server_captures(recorder: Recorder, shelf: Shelf) -> None:
    facts = msgspec.structs.replace(FACTS, aux_layers=[1, 3])
    capture = Capture((1, 3), last_hidden_state=False)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=HIDDEN, num_hidden_layers=6, num_attention_heads=2, intermediate_size=8, vocab_size=100)
    ).eval()
    server = LayerStates(model, Capture((1, 3), last_hidden_state=True))
    with torch.no_grad():
        plain = model(torch.tensor([[5, 6, 7, 8]]), output_hidden_states=True)
    collected, expected = torch.cat(server.layers, dim=-1)[0], [plain.hidden_states[n][0] for n in (2, 4)]
    assert server.last is not None

    recording = Recording(order_of(4, identity=msgspec.structs.replace(IDENTITY, capture=capture)))
    for rows in (slice(0, 3), slice(3, 4)):
        recorder.collect(recording, aux=collected[rows], last=server.last[0, rows])
    held = recording.nbytes
    recorder.finish(recording, [5, 6, 7, 8], lambda: facts)

    assert isinstance(settled(recorder, recording), StoredReply)
    sample = shelf.samples["s000000001"]
    assert list(sample) == ["input_ids", "loss_mask", "aux_hidden_states"]
    assert torch.equal(sample["aux_hidden_states"], torch.cat(expected, dim=-1))
    assert held == collected.nbytes, "states that no sample wants are not kept"


def test_states_of_another_width_are_refused(recorder: Recorder, shelf: Shelf) -> None:
    recording = Recording(order_of(3))
    recorder.collect(recording, aux=torch.zeros(3, 2 * HIDDEN), last=torch.zeros(3, HIDDEN))
    recorder.finish(recording, [5, 6, 7], lambda: FACTS)

    reply = settled(recorder, recording)

    assert isinstance(reply, RefusedReply)
    assert reply.reason == "expected 3 layers of 4, found 8 values per token"
    assert shelf.samples == {}


def test_a_reply_waits_for_its_own_sample_only(recorder: Recorder, shelf: Shelf) -> None:
    shelf.gate.clear()
    slow = capture(recorder, order_of(3), 3, 3)
    refused = capture(recorder, order_of(3), 3, 2)
    slow_request = SimpleNamespace(rid="slow", origin_input_ids=[], customized_info=None)
    quick_request = SimpleNamespace(rid="quick", origin_input_ids=[], customized_info=None)

    assert recorder.hold(slow, slow_request, "streamer")
    assert not recorder.hold(refused, quick_request, "streamer")
    assert recorder.released() == []
    assert recorder.holding == 1
    shelf.gate.set()
    assert isinstance(settled(recorder, slow), StoredReply)


@pytest.mark.parametrize("rows", [1, 63, 65])
def test_rows_that_are_not_the_prompts_tokens_are_refused(recorder: Recorder, shelf: Shelf, rows: int) -> None:
    reply = settled(recorder, capture(recorder, order_of(64), 64, rows))

    assert isinstance(reply, RefusedReply)
    assert not reply.retryable
    assert f"expected 64 rows of states for 64 prompt tokens, found {rows}" in reply.reason
    assert shelf.samples == {}


@pytest.mark.parametrize(
    ("identity", "reason"),
    [
        ({"capture": Capture((1, 3, 5), True)}, r"layers [1, 3, 5], this server captures [0, 2, 4]"),
        ({"dtype": "bfloat16"}, "expected states in bfloat16, this server's are float32"),
    ],
)
def test_an_order_for_another_target_is_refused(
    recorder: Recorder, shelf: Shelf, identity: dict[str, Any], reason: str
) -> None:
    order = order_of(3, identity=msgspec.structs.replace(IDENTITY, **identity))
    reply = settled(recorder, capture(recorder, order, 3, 3))

    assert isinstance(reply, RefusedReply)
    assert reason in reply.reason
    assert shelf.samples == {}


def test_an_order_for_another_model_is_refused(recorder: Recorder, shelf: Shelf) -> None:
    reply = settled(recorder, capture(recorder, order_of(3, fingerprint="g"), 3, 3))

    assert isinstance(reply, RefusedReply)
    assert reply.reason == "expected the model g, this server runs f (/models/target)"
    assert shelf.samples == {}


def test_a_store_that_fails_is_an_answer_and_the_next_sample_goes_on(recorder: Recorder, shelf: Shelf) -> None:
    shelf.full = True
    reply = settled(recorder, capture(recorder, order_of(3), 3, 3))
    shelf.full = False
    after = settled(recorder, capture(recorder, order_of(3), 3, 3))

    assert reply == RefusedReply(reason="StoreFull: no room", retryable=True, store=True)
    assert isinstance(after, StoredReply)


def test_a_sample_whose_order_has_run_out_is_not_kept(shelf: Shelf) -> None:
    times = iter([100.0, 300.0])
    recorder = Recorder(lambda _address: shelf, clock=lambda: next(times))

    reply = settled(recorder, capture(recorder, order_of(3), 3, 3))

    assert isinstance(reply, RefusedReply)
    assert reply.retryable
    assert shelf.samples == {}


def test_the_sample_of_an_aborted_request_is_removed(recorder: Recorder, shelf: Shelf) -> None:
    shelf.gate.clear()
    before = capture(recorder, order_of(3), 3, 3)
    recorder.abandon(before)
    shelf.gate.set()
    settled(recorder, before)
    after = capture(recorder, order_of(3, sample_id="s000000002"), 3, 3)
    settled(recorder, after)
    recorder.abandon(after)
    settled(recorder, capture(recorder, order_of(3, sample_id="s000000003"), 3, 3))

    assert list(shelf.samples) == ["s000000003"]


def test_states_beyond_the_bound_are_refused_for_now(shelf: Shelf) -> None:
    recorder = Recorder(lambda _address: shelf, max_pending_bytes=1, clock=lambda: 100.0)
    shelf.gate.clear()
    first = capture(recorder, order_of(3), 3, 3)
    second = settled(recorder, capture(recorder, order_of(3), 3, 3))
    shelf.gate.set()

    assert isinstance(second, RefusedReply)
    assert second.retryable
    assert second.busy, "nothing has failed"
    assert isinstance(settled(recorder, first), StoredReply)


def test_a_request_that_was_taken_back_starts_anew(recorder: Recorder, shelf: Shelf) -> None:
    recording = Recording(order_of(4))
    aux, last = states(2)
    recorder.collect(recording, aux=aux, last=last)
    recorder.restart(recording)
    aux, last = states(4)
    recorder.collect(recording, aux=aux, last=last)
    recorder.finish(recording, [0, 1, 2, 3], lambda: FACTS)

    assert isinstance(settled(recorder, recording), StoredReply)


@pytest.mark.parametrize("last_hidden_state", [True, False])
def test_states_that_are_not_finite_are_refused(recorder: Recorder, shelf: Shelf, last_hidden_state: bool) -> None:
    capture = Capture((0, 2, 4), last_hidden_state)
    recording = Recording(order_of(2, identity=msgspec.structs.replace(IDENTITY, capture=capture)))
    aux, last = states(2)
    (last if last_hidden_state else aux)[1, 1] = float("nan")
    recorder.collect(recording, aux=aux, last=last)
    recorder.finish(recording, [0, 1], lambda: FACTS)

    reply = settled(recorder, recording)

    assert reply == RefusedReply(reason="the target's hidden states are not finite", retryable=False)


def test_a_probe_brings_its_states_back(recorder: Recorder, shelf: Shelf) -> None:
    reply = settled(recorder, capture(recorder, ProbeOrder(), 4, 4))

    assert isinstance(reply, ProbeReply)
    assert (reply.facts, reply.now) == (FACTS, 100.0)
    found = unpack(torch.frombuffer(bytearray(reply.data), dtype=torch.uint8), reply.tensors)
    assert found["aux_hidden_states"].shape == (4, 3 * HIDDEN)
    assert found["last_hidden_state"].dtype == torch.float32
    assert shelf.samples == {}


def test_only_a_few_stores_stay_open() -> None:
    opened: list[Shelf] = []

    def open_store(_address: StoreAddress) -> Shelf:
        opened.append(Shelf())
        return opened[-1]

    recorder = Recorder(open_store, clock=lambda: 100.0)
    for attempt in (1, 2, 1, 3):
        address = StoreAddress(
            master_address="h:1",
            metrics_address="h:2",
            namespace=f"run/{attempt}",
            protocol="tcp",
            checksum=True,
            put_timeout_s=5.0,
        )
        settled(recorder, capture(recorder, order_of(2, store=address), 2, 2))

    assert [shelf.closed for shelf in opened] == [False, True, False]


def test_nothing_is_put_on_a_request_that_has_no_order(recorder: Recorder) -> None:
    request = SimpleNamespace(rid="r", origin_input_ids=[], customized_info={"other": [1]})
    recording = Recording(None)
    recorder.refuse(recording, "unreadable", retryable=False)

    assert not recorder.hold(recording, request, "streamer")
    assert set(request.customized_info) == {"other", WIRE_KEY}
