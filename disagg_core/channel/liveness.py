"""Who is alive: process identities, claims on a side of the channel, heartbeats, and the watch over progress.

Two questions are kept apart. *Is the holder of a claim alive?* is answered by the kernel where the holder runs on
this machine, and by watching its heartbeat with our own clock where it does not. *Does the other side get anywhere?*
is answered by its progress alone: a process that renews its heartbeat and does nothing is stalled.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path

from msgspec.structs import replace

from disagg_core.channel.contract import SIDE_NAMES, ClaimStatus, ClaimStore, PeerState, Side
from disagg_core.errors import ChannelBusy, ChannelStalled, ChannelUnavailable, DraftlineError

logger = logging.getLogger(__name__)

LEASE_S = 45.0
"""A claim held on another machine is dead when its heartbeat has not changed for so many seconds of our own clock.

Long enough for a link that is cut for ten seconds, with the time-outs and the reconnecting that follow.
"""

HEARTBEATS_PER_LEASE = 15


@dataclass(frozen=True)
class ProcessIdentity:
    """Names one process so that it can be found dead: machine boot, pid namespace, pid, and start time in ticks."""

    host: str
    boot: str
    pid_space: str
    pid: int
    started: int

    @classmethod
    def mine(cls) -> ProcessIdentity:
        """Return this process's identity."""
        boot, pid_space = _machine()
        return cls(socket.gethostname(), boot, pid_space, os.getpid(), _start_of(os.getpid()) or 0)


@lru_cache(maxsize=1)
def _machine() -> tuple[str, str]:
    """Return what must be equal for two processes to see each other's pids."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").readlink())


def _start_of(pid: int) -> int | None:
    """Return the start time of a running process in clock ticks; None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def holder_is_alive(claim: ClaimStatus) -> bool | None:
    """Return whether the holder's process runs; None when it is on a machine that we cannot look into."""
    if (claim.boot, claim.pid_space) != _machine():
        return None
    return _start_of(claim.pid) == claim.started


def acquire_claim(
    store: ClaimStore,
    side: Side,
    *,
    where: str,
    run_id: str,
    attempt: int,
    process: ProcessIdentity,
    lease_s: float = LEASE_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], object] = time.sleep,
) -> ClaimStatus:
    """Take a side of the channel, or refuse.

    A claim that was released, or whose process is dead, is taken over at once. One on another machine is watched for
    `lease_s` seconds; a single heartbeat in that time keeps it.

    Raises:
        ChannelBusy: the claim is held by a live process; its host, pid and last heartbeat are named.
    """
    held = store.read_claim(side)
    if held is not None and not held.released:
        alive = holder_is_alive(held)
        if alive is None:
            alive = _beats_within(store, side, held, lease_s, clock, sleep)
        if alive:
            raise _busy(side, where, held)
        logger.warning("taking over %s of %s from %s, which is dead", SIDE_NAMES[side], where, held.holder)
    now = time.time()
    claim = ClaimStatus(
        run_id=run_id,
        attempt=attempt,
        epoch=1 if held is None else held.epoch + 1,
        host=process.host,
        boot=process.boot,
        pid_space=process.pid_space,
        pid=process.pid,
        started=process.started,
        token=uuid.uuid4().hex,
        beat_at=now,
        did="claimed the channel",
        did_at=now,
    )
    if not store.swap_claim(side, claim):
        newest = store.read_claim(side)
        # A swap that was sent twice over a broken connection finds its own first try.
        if newest is None or newest.token != claim.token:
            raise _busy(side, where, newest)
    return claim


def _beats_within(
    store: ClaimStore,
    side: Side,
    held: ClaimStatus,
    lease_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], object],
) -> bool:
    deadline = clock() + lease_s
    while clock() < deadline:
        sleep(min(lease_s / 20, max(0.0, deadline - clock())))
        now = store.read_claim(side)
        if now is None or now.released:
            return False
        if (now.epoch, now.beat) != (held.epoch, held.beat):
            return True
    return False


def _busy(side: Side, where: str, held: ClaimStatus | None) -> ChannelBusy:
    who = "another process, at this moment" if held is None else f"{held.holder}, last heartbeat {_ago(held.beat_at)}"
    return ChannelBusy(
        f"{where} has its {side} already: {who}. One {side} is allowed; stop it first "
        "(a dead one is taken over by itself)"
    )


def _ago(wall: float) -> str:
    return f"{max(0.0, time.time() - wall):.1f} s ago at {datetime.fromtimestamp(wall):%H:%M:%S}"


def fenced(side: Side, where: str, mine: ClaimStatus, newer: ClaimStatus | None) -> ChannelBusy:
    """Return the error of a process whose claim was taken over while it was thought to be dead."""
    who = "another process" if newer is None else newer.holder
    return ChannelBusy(f"{where}: the {side}'s claim {mine.epoch} of this process was taken over by {who}; stop here")


@dataclass(frozen=True)
class PeerStatus:
    """What one side of the channel looks like from outside. Ages are in seconds; None without a claim.

    `state`: ``absent`` (never came), ``running``, ``released`` (disconnected without ending), ``lost`` (its process is
    dead), and the terminal ``ended``/``failed`` of the writer and ``done``/``failed`` of the reader, with `reason`.
    """

    side: Side
    state: PeerState
    reason: str = ""
    claim: ClaimStatus | None = None

    @property
    def active(self) -> bool:
        """Whether something may still come from this side."""
        return self.state in ("absent", "running")

    @property
    def terminal(self) -> bool:
        """Whether this side is in a terminal state."""
        return self.state in ("ended", "done", "failed")

    def describe(self) -> str:
        """Return one line: which side, in what state, since when, and what it last did."""
        name = SIDE_NAMES[self.side]
        if self.claim is None:
            return f"{name} {'has never opened the channel' if self.state == 'absent' else f'is {self.state}'}"
        detail = f" ({self.reason})" if self.reason else ""
        return (
            f"{name}, {self.claim.holder}, is {self.state}{detail}; last heartbeat {_ago(self.claim.beat_at)}; "
            f"last progress {_ago(self.claim.did_at)}: {self.claim.did}"
        )


class PeerWatch:
    """Judges the holder of a side as seen from here: dead by its pid, or by heartbeats that stopped changing."""

    def __init__(self, lease_s: float, clock: Callable[[], float]) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._last: tuple[int, int] | None = None
        self._changed = clock()

    def state(self, claim: ClaimStatus | None) -> PeerState:
        """Return `absent`, `released`, `running` or `lost` for the newest claim of the side."""
        if claim is None:
            return "absent"
        if claim.released:
            return "released"
        beat = (claim.epoch, claim.beat)
        if beat != self._last:
            self._last, self._changed = beat, self._clock()
        alive = holder_is_alive(claim)
        if alive is None:
            alive = self._clock() - self._changed < self._lease_s
        return "running" if alive else "lost"


class IdleWatch:
    """Measures how long the other side has made no progress while we wait for it. Pure; the clock is injected.

    Time counts from the last change of the token or from the beginning of the waiting, whichever is later: being busy
    ourselves is not the other side's silence.
    """

    def __init__(self, side: Side, timeout_s: float, clock: Callable[[], float]) -> None:
        self._side = side
        self._timeout_s = timeout_s
        self._clock = clock
        self._token: Hashable = None
        self._since: float | None = None

    def stop_waiting(self) -> None:
        """Note that we got what we waited for."""
        self._since = None

    def idle_s(self, token: Hashable) -> float:
        """Return for how many seconds nothing changed; `token` is anything that changes with the side's progress."""
        now = self._clock()
        if self._since is None or token != self._token:
            self._token, self._since = token, now
        return now - self._since

    def check(self, token: Hashable, describe: Callable[[], str]) -> None:
        """Raise `ChannelStalled` if the token has not changed for the timeout.

        The message names the side, since when it is silent, and what it last did (`describe`).
        """
        idle = self.idle_s(token)
        if idle >= self._timeout_s:
            since = datetime.fromtimestamp(time.time() - idle)
            raise ChannelStalled(
                f"{SIDE_NAMES[self._side]} made no progress for {idle:.1f} s (idle timeout {self._timeout_s:g} s), "
                f"since {since:%H:%M:%S}: {describe()}"
            )


class Heartbeat:
    """Renews one claim from a background thread, carrying this side's progress.

    When the claim was taken over, the thread stops and `lost` is set; the side's next operation raises it.
    """

    def __init__(self, store: ClaimStore, side: Side, claim: ClaimStatus, *, where: str, interval_s: float) -> None:
        self.claim = claim
        self.lost: ChannelBusy | None = None
        self._store = store
        self._side = side
        self._where = where
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._beating = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"draftline-{side}-heartbeat", daemon=True)
        self._thread.start()

    def progressed(self, did: str, count: int) -> None:
        """Note what this side did; it travels with the next heartbeat."""
        with self._lock:
            self.claim = replace(self.claim, progress=self.claim.progress + 1, did=did, did_at=time.time(), count=count)

    def check(self) -> None:
        """Raise `ChannelBusy` if the claim was lost."""
        if self.lost is not None:
            raise self.lost

    def beat(self, *, released: bool = False) -> None:
        """Renew the claim now."""
        with self._beating:  # heartbeats arrive in order, and a slow one does not hold up `progressed`
            with self._lock:
                self.claim = replace(self.claim, beat=self.claim.beat + 1, beat_at=time.time(), released=released)
                claim = self.claim
            if not self._store.beat(self._side, claim):
                self.lost = fenced(self._side, self._where, claim, self._store.read_claim(self._side))
                self._stop.set()
                logger.error("%s", self.lost)

    def release(self) -> None:
        """Stop beating and give the claim back, so that it can be taken at once."""
        self._stop.set()
        self._thread.join()
        if self.lost is None:
            try:
                self.beat(released=True)
            except ChannelUnavailable as error:  # the claim is then taken over from a dead process
                logger.warning("the %s's claim of %s could not be given back: %s", self._side, self._where, error)

    def abandon(self) -> None:
        """Stop beating without giving the claim back: what a crash does."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                self.beat()
            except DraftlineError as error:  # the side itself meets it with its next operation
                logger.warning("heartbeat of the %s of %s did not get through: %s", self._side, self._where, error)
