"""The reference channel: a tensor-free, ordered stream of sample references between two processes."""

from disagg_core.channel.channel import StreamingRefChannel
from disagg_core.channel.contract import ChannelBackend, Cursor
from disagg_core.channel.inspection import ChannelInspection, inspect_channel
from disagg_core.channel.liveness import PeerStatus
from disagg_core.channel.queue import StreamingRefQueue

__all__ = [
    "ChannelBackend",
    "ChannelInspection",
    "Cursor",
    "PeerStatus",
    "StreamingRefChannel",
    "StreamingRefQueue",
    "inspect_channel",
]
