"""The error table: what each of Mooncake's return codes means to us, in one place.

Mooncake's Python calls return numbers. `verdict_of` says what kind of answer a number is, and so what the client does
next; `error_from_code` turns it into the named error that a caller sees. The names are those of Mooncake's
``ErrorCode`` (mooncake-store, ``types.h``, 0.3.13).
"""

from __future__ import annotations

from enum import Enum

from disagg_core.errors import SampleLost, StoreError, StoreFull, StoreRejected, StoreUnavailable


class Verdict(Enum):
    """What the client does about an answer."""

    DONE = "done"
    FULL = "wait for room, up to a deadline"
    LOST = "the object is gone; capture the sample again"
    TRANSIENT = "retry, up to a deadline; a put uses a new key"
    BUG = "raise"


_TABLE: dict[int, tuple[str, Verdict]] = {
    -101: ("SEGMENT_NOT_FOUND", Verdict.TRANSIENT),
    -200: ("NO_AVAILABLE_HANDLE", Verdict.FULL),
    -1700: ("TENANT_QUOTA_EXCEEDED", Verdict.FULL),
    -703: ("REPLICA_IS_NOT_READY", Verdict.TRANSIENT),
    -704: ("OBJECT_NOT_FOUND", Verdict.LOST),
    -706: ("OBJECT_HAS_LEASE", Verdict.TRANSIENT),
    -707: ("LEASE_EXPIRED", Verdict.TRANSIENT),
    -710: ("REPLICA_NOT_FOUND", Verdict.LOST),
    -712: ("REPLICA_IS_GONE", Verdict.LOST),
    -714: ("OBJECT_REPLICA_BUSY", Verdict.TRANSIENT),
    -800: ("TRANSFER_FAIL", Verdict.TRANSIENT),
    -801: ("CHECKSUM_MISMATCH", Verdict.TRANSIENT),
    -900: ("RPC_FAIL", Verdict.TRANSIENT),
    -901: ("RPC_TIMEOUT", Verdict.TRANSIENT),
    -1010: ("UNAVAILABLE_IN_CURRENT_STATUS", Verdict.TRANSIENT),
}

_SETTLED = frozenset({-101, -200, -703, -704, -710, -712, -900, -901, -1010, -1700})
"""Codes that the master gives before any byte moves."""


def verdict_of(code: int) -> Verdict:
    """Return what kind of answer `code` is; a count of bytes (0 or more) is `Verdict.DONE`."""
    if code >= 0:
        return Verdict.DONE
    return _TABLE[code][1] if code in _TABLE else Verdict.BUG


def is_settled(code: int) -> bool:
    """Tell whether a call that answered `code` is certain to leave no transfer running behind it.

    After any other failure the transfer may still write into (or read from) the buffer that was given to the call.
    """
    return code >= 0 or code in _SETTLED


def error_from_code(code: int, *, operation: str, key: str, note: str = "") -> StoreError:
    """Return the named error for the negative `code` with which `operation` on `key` was answered.

    Args:
        code: Mooncake's return code, below zero.
        operation: the call, as a person would say it (``put``, ``get``, ``remove``).
        key: the object's key.
        note: what else is known (used and total bytes, how often it was tried), put at the end of the message.
    """
    name, verdict = _TABLE.get(code, ("unknown to draftline", Verdict.BUG))
    what = f"{operation} of {key}: Mooncake answered {code} ({name})"
    tail = f"; {note}" if note else ""
    if verdict is Verdict.FULL:
        return StoreFull(f"{what}; the store is full{tail}; give it more memory or let the consumer catch up")
    if verdict is Verdict.LOST:
        return SampleLost(f"{what}; expected the sample, found nothing{tail}; it has to be captured again")
    if verdict is Verdict.TRANSIENT:
        return StoreUnavailable(f"{what}{tail}; look at the logs of the store's master and owner, then try again")
    return StoreRejected(f"{what}{tail}; this is a bug in draftline or a Mooncake version it does not know")
