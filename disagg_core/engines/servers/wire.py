"""What the producer and the plugin inside an SGLang server say to each other: orders in, replies out, JSON both ways.

An order travels in a request's ``sampling_params.custom_params[WIRE_KEY]``; the reply comes back in the response's
``meta_info[WIRE_KEY]``. Both ends are this package, in two environments, so the structs are strict: an unknown field
means that the two are not of the same version. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TypeAlias

import msgspec

from disagg_core.contracts import FeatureSpec, RunIdentity, SampleRef
from disagg_core.store.capacity import STAGING_BYTES

SGLANG_VERSION = "0.5.23"
"""The only SGLang version whose internals the plugin knows."""

WIRE_KEY = "draftline"
"""Name of our entry in a request's custom parameters and in a response's meta information."""


class StoreAddress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which feature store a server has to write to, how, and with how much transfer memory of one direction."""

    master_address: str
    metrics_address: str
    namespace: str
    protocol: str
    checksum: bool
    put_timeout_s: float
    staging_bytes: int = STAGING_BYTES


class CaptureOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="capture"):
    """Write the states of this request's prompt to the store as one sample.

    `server` is what the producer calls this server, `fingerprint` that of the model it has to run. `loss_spans` are
    the half-open token ranges with loss mask 1. `deadline` is a reading of the server's own monotonic clock, which the
    producer knows from the probe: whoever ordered has given up by then, so a sample that is finished later is removed
    again.
    """

    sample_id: str
    source_task_id: str
    server: str
    fingerprint: str
    num_tokens: int
    loss_spans: list[tuple[int, int]]
    identity: RunIdentity
    store: StoreAddress
    deadline: float


class ProbeOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="probe"):
    """Send the states of this request's prompt back in the reply, with what the server knows about itself."""


Order: TypeAlias = CaptureOrder | ProbeOrder


class StoredReply(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="stored"):
    """The sample is in the store. `copy_s` and `put_s` are its shares of the writer's time, in seconds."""

    ref: SampleRef
    copy_s: float
    put_s: float


class RefusedReply(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="refused"):
    """There is no sample, and nothing of it is in the store. `retryable`: another server may do better.

    `store`: it was the store that failed, or this server's way to it; the prompt has no part in it. `busy`: neither
    failed, the server could not keep up; to be tried again when it has less to do.
    """

    reason: str
    retryable: bool
    store: bool = False
    busy: bool = False


class ServerFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a server's capture process says about the model it runs.

    `fingerprint` is `disagg_core.target.facts.model_fingerprint` of its files; `aux_layers` is None where the server
    chose the layers itself; `settings` are the switches that decide whether a capture can be trusted.
    """

    sglang_version: str
    model_path: str
    revision: str | None
    fingerprint: str
    model_type: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    dtype: str
    aux_layers: list[int] | None
    context_length: int
    tensor_parallel: int
    settings: dict[str, bool]


class ProbeReply(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="probed"):
    """The probe's states: one packed buffer and where the tensors lie in it, as for a stored sample.

    `now` is what the server's monotonic clock read, in seconds, when this was made.
    """

    facts: ServerFacts
    now: float
    tensors: dict[str, FeatureSpec]
    data: bytes


Reply: TypeAlias = StoredReply | RefusedReply | ProbeReply

_ORDERS: msgspec.json.Decoder[Order] = msgspec.json.Decoder(Order)
_REPLIES: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)


def encode_order(order: Order) -> dict[str, str]:
    """Return `order` as a request's custom parameters."""
    return {WIRE_KEY: msgspec.json.encode(order).decode()}


def decode_order(text: str) -> Order:
    """Read an order from a request's custom parameters.

    Raises:
        msgspec.ValidationError: it is not an order of this version.
    """
    return _ORDERS.decode(text)


def encode_reply(reply: Reply) -> str:
    """Return `reply` as it stands in a response's meta information."""
    return msgspec.json.encode(reply).decode()


def find_reply(entries: Sequence[str | None] | None) -> Reply | None:
    """Return the plugin's reply among a response's `entries` under `WIRE_KEY`, or None if no plugin answered.

    SGLang returns one entry per generated token; ours is the first that is not empty.

    Raises:
        msgspec.DecodeError: the plugin is of another version than this package.
    """
    for entry in entries or ():
        if entry is not None:
            return _REPLIES.decode(entry)
    return None


def spans_of(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Return the half-open ranges of `mask` that hold 1: ``[0, 1, 1, 0] -> [(1, 3)]``."""
    spans = []
    position = 0
    for live, run in groupby(bool(value) for value in mask):
        length = sum(1 for _ in run)
        if live:
            spans.append((position, position + length))
        position += length
    return spans


def mask_of(spans: Sequence[tuple[int, int]], num_tokens: int) -> list[int]:
    """Return the mask of `num_tokens` tokens that `spans_of` was made from.

    Raises:
        ValueError: a span lies outside the tokens.
    """
    mask = [0] * num_tokens
    for start, end in spans:
        if not 0 <= start < end <= num_tokens:
            raise ValueError(f"expected loss spans within {num_tokens} tokens, found [{start}, {end})")
        mask[start:end] = [1] * (end - start)
    return mask
