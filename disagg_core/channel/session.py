"""What both sides of a channel are made with: whose channel it is, the timeouts, the clocks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from disagg_core.channel.contract import ChannelBackend, ClaimStatus, Side
from disagg_core.channel.liveness import HEARTBEATS_PER_LEASE, LEASE_S, Heartbeat, ProcessIdentity, acquire_claim
from disagg_core.errors import ForeignChannel


@dataclass(frozen=True)
class ChannelSession:
    """One process's way into one channel."""

    backend: ChannelBackend
    run_id: str
    attempt: int
    idle_timeout_s: float
    lease_s: float = LEASE_S
    clock: Callable[[], float] = time.monotonic
    process: ProcessIdentity = field(default_factory=ProcessIdentity.mine)

    def claim(self, side: Side) -> Heartbeat:
        """Take a side and keep it with heartbeats.

        Raises:
            ForeignChannel: the channel is another run's or attempt's; nothing was changed.
            ChannelBusy: the side is held by a live process.
        """
        self.check_ours()
        status = acquire_claim(
            self.backend,
            side,
            where=self.backend.where,
            run_id=self.run_id,
            attempt=self.attempt,
            process=self.process,
            lease_s=self.lease_s,
        )
        interval = self.lease_s / HEARTBEATS_PER_LEASE
        return Heartbeat(self.backend, side, status, where=self.backend.where, interval_s=interval)

    def check_ours(self) -> None:
        """Raise `ForeignChannel` if anything there says that the channel is another run's or attempt's."""
        self.backend.check_owner()
        for side in ("writer", "reader"):
            self._check_claim(self.backend.read_claim(side))

    def _check_claim(self, claim: ClaimStatus | None) -> None:
        if claim is None or not claim.run_id or (claim.run_id, claim.attempt) == (self.run_id, self.attempt):
            return
        raise ForeignChannel(
            f"{self.backend.where} was claimed for attempt {claim.attempt} of run {claim.run_id!r}, expected attempt "
            f"{self.attempt} of run {self.run_id!r}; give each attempt a channel of its own"
        )
