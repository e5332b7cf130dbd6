"""What travels between producer and plugin, and what does not."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_core.contracts import Capture
from disagg_core.engines.servers.wire import (
    WIRE_KEY,
    CaptureOrder,
    ProbeOrder,
    RefusedReply,
    decode_order,
    encode_order,
    encode_reply,
    find_reply,
    mask_of,
    spans_of,
)
from tests.unit.engines.kit import ADDRESS, IDENTITY

pytestmark = pytest.mark.unit


@given(st.lists(st.integers(0, 1), max_size=200))
def test_a_mask_survives_as_spans(mask: list[int]) -> None:
    spans = spans_of(mask)

    assert mask_of(spans, len(mask)) == mask
    assert all(end < following for (_, end), (following, _) in pairwise(spans))


@pytest.mark.parametrize("span", [(0, 5), (-1, 2), (2, 2), (3, 1)])
def test_a_span_beyond_the_tokens_is_refused(span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="expected loss spans within 4 tokens"):
        mask_of([span], 4)


def test_orders_and_replies_travel_as_text() -> None:
    refusal = RefusedReply(reason="no", retryable=True)

    assert decode_order(encode_order(ProbeOrder())[WIRE_KEY]) == ProbeOrder()
    assert find_reply([None, encode_reply(refusal)]) == refusal


@pytest.mark.parametrize("capture", [Capture((0, 2, 4), True), Capture((5,), False)])
def test_what_is_to_be_captured_travels_with_the_identity(capture: Capture) -> None:
    order = CaptureOrder(
        sample_id="s000000001",
        source_task_id="prompts:1",
        server="sglang-0",
        fingerprint="f",
        num_tokens=3,
        loss_spans=[(1, 3)],
        identity=msgspec.structs.replace(IDENTITY, capture=capture),
        store=ADDRESS,
        deadline=1.0,
    )

    found = decode_order(encode_order(order)[WIRE_KEY])

    assert found == order
    assert isinstance(found, CaptureOrder)
    assert hash(found.identity.capture) == hash(capture), "the layers are a tuple again"


def test_no_plugin_no_reply() -> None:
    assert find_reply(None) is None
    assert find_reply([]) is None


@pytest.mark.parametrize("text", ["{", '{"type": "capture"}', '{"type": "probe", "more": 1}', '{"type": "other"}'])
def test_another_version_is_an_error_and_not_a_guess(text: str) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_order(text)
