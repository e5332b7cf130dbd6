"""The servers of a run as one pool: who may take a request, who is down, and who brings it back.

Each server has a supervisor thread. It starts the server (a managed one) or waits for it (an external one), checks it
before its first request and after every return, notices its death or hanging, and starts it again with growing
pauses. Whether a server that runs may take work is the circuit breakers' decision (`engines.servers.circuit`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from disagg_core.engines.contract import ServerHealth
from disagg_core.engines.servers.circuit import CircuitBreakers
from disagg_core.engines.servers.contract import ServerClient, ServerFailure
from disagg_core.engines.servers.process import ManagedServer
from disagg_core.errors import TargetError, TargetUnavailable
from disagg_core.processes.retry import join_all, wait_until
from disagg_core.processes.shutdown import POOL_S

logger = logging.getLogger(__name__)

_WATCH_INTERVAL_S = 1.0
_POLL_S = 0.5
_LONGEST_PAUSE_S = 60.0
_LATE_S = 20.0
_FAILED_STARTS_AT_FIRST = 2


@dataclass
class PoolMember:
    """One server: how to reach it, and its process if it is ours."""

    client: ServerClient
    managed: ManagedServer | None = None
    restarts: int = 0
    captured: int = 0
    answered: int = 0
    checked: threading.Event = field(default_factory=threading.Event)  # its first start is decided
    suspect: threading.Event = field(default_factory=threading.Event)
    refused: TargetError | None = None

    @property
    def name(self) -> str:
        """Its name in reports."""
        return self.client.name


class ServerPool:
    """Leases places on servers; safe across threads.

    Args:
        members: the servers; names must differ.
        concurrency: requests in flight per server.
        check: raises `TargetError` if a server is not the run's target, `ServerFailure` if it does not answer.
        start_timeout_s: how long a server may take until it is healthy.
        place_timeout_s: how long a request may wait for a place before the servers count as unavailable to it.
        health_timeout_s: a suspected server that does not answer its health check for so long hangs.
    """

    def __init__(
        self,
        members: Sequence[PoolMember],
        *,
        concurrency: int,
        check: Callable[[ServerClient], None],
        start_timeout_s: float,
        place_timeout_s: float,
        health_timeout_s: float = 20.0,
    ) -> None:
        self._members = {member.name: member for member in members}
        self._check = check
        self._start_timeout_s = start_timeout_s
        self._place_timeout_s = place_timeout_s
        self._health_timeout_s = health_timeout_s
        self._changed = threading.Condition()
        self._breakers = CircuitBreakers(self._members, concurrency=concurrency, clock=time.monotonic)
        self._stop = threading.Event()
        self._supervisors = [
            threading.Thread(target=self._supervise, args=(member,), name=f"supervise-{member.name}", daemon=True)
            for member in members
        ]

    def start(self, *, while_waiting: Callable[[], None] = lambda: None) -> None:
        """Start every server and check it; return when all are decided and at least one is usable.

        `while_waiting` is called twice a second and raises what is to end the waiting.

        Raises:
            TargetError: a server is not the run's target; all that are not are named.
            TargetUnavailable: none could be reached or started.
        """
        for member in self._members.values():
            self._breakers.take_away(member.name, "starting")
        for supervisor in self._supervisors:
            supervisor.start()
        self._await_first_checks(while_waiting)
        refused = [str(member.refused) for member in self._members.values() if member.refused is not None]
        if refused:
            raise TargetError("; ".join(refused))
        with self._changed:
            if not self._breakers.any_usable:
                raise TargetUnavailable(f"no server could be started or reached: {self._reasons()}")

    def _await_first_checks(self, while_waiting: Callable[[], None]) -> None:
        """Wait until every server is decided; for external ones only a little once another one is usable."""
        usable_since: float | None = None
        for member in self._members.values():
            while not member.checked.wait(_POLL_S):
                while_waiting()
                with self._changed:
                    usable = self._breakers.any_usable
                if usable and usable_since is None:
                    usable_since = time.monotonic()
                if self._stop.is_set():
                    raise TargetUnavailable("the servers were stopped while they started")
                late = usable_since is not None and time.monotonic() - usable_since > _LATE_S
                if late and member.managed is None:
                    logger.warning("%s is not there yet; it will be checked when it comes", member.name)
                    break

    def acquire(self, avoid: Collection[str]) -> ServerClient:
        """Wait for a place on a usable server and take it; end it with `succeeded` or `failed`.

        Raises:
            TargetUnavailable: every server is out at present, or busy for too long.
        """
        with self._changed:
            name = wait_until(
                lambda: self._place(avoid),
                timeout_s=self._place_timeout_s,
                every_s=_POLL_S,
                sleep=self._changed.wait,
            )
        if name is None:
            raise TargetUnavailable(f"no server had a place within {self._place_timeout_s:g} s")
        return self._members[name].client

    def _place(self, avoid: Collection[str]) -> str | None:
        """Take a place if there is one at this moment; return the server's name."""
        if not self._breakers.any_usable or self._stop.is_set():
            raise TargetUnavailable(f"no server is usable at present: {self._reasons()}")
        return self._breakers.acquire(avoid)

    def succeeded(self, name: str, *, captured: bool) -> None:
        """End a request that was answered, with a sample (`captured`), a continuation, or a refusal of the prompt."""
        with self._changed:
            self._breakers.succeeded(name)
            self._members[name].captured += captured
            self._members[name].answered += 1
            self._changed.notify_all()

    def busy(self, name: str, reason: str) -> None:
        """End a request that the server had no room for: it gets less to do, and is not suspected of anything."""
        with self._changed:
            self._breakers.busy(name, reason)
            self._changed.notify_all()

    def failed(self, name: str, reason: str) -> None:
        """End a request that was not answered, and have the server looked at."""
        with self._changed:
            self._breakers.failed(name, reason)
            self._changed.notify_all()
        self._members[name].suspect.set()

    def health(self) -> list[ServerHealth]:
        """Return what became of every server."""
        with self._changed:
            reports = self._breakers.reports()
        return [
            ServerHealth(
                name=report.name,
                state=report.state,
                captured=self._members[report.name].captured,
                failures=report.failures,
                restarts=self._members[report.name].restarts,
                queue_depth=report.in_flight,
                worked=self._members[report.name].answered,
                events=list(report.events),
            )
            for report in reports
        ]

    def close(self) -> None:
        """Stop the servers that we started, all at the same time, and their supervisors; takes `POOL_S` at most."""
        self._stop.set()
        ending = [supervisor for supervisor in self._supervisors if supervisor.is_alive()]
        for member in self._members.values():
            member.suspect.set()
            if member.managed is not None:  # at once: its supervisor may wait for an answer of it
                ending.append(threading.Thread(target=member.managed.close, name=f"stop-{member.name}", daemon=True))
                ending[-1].start()
        late = join_all(ending, POOL_S)
        if late:
            logger.warning("left behind after %g s: %s", POOL_S, ", ".join(thread.name for thread in late))
        for member in self._members.values():
            member.client.close()

    def _reasons(self) -> str:
        return "; ".join(
            f"{report.name}: {report.last_reason or 'no reason known'}" for report in self._breakers.reports()
        )

    # --- supervision ----------------------------------------------------------------------------------------------

    def _supervise(self, member: PoolMember) -> None:
        try:
            self._keep_alive(member)
        except Exception as error:
            logger.exception("the supervisor of %s failed", member.name)
            self._out(member, f"its supervisor failed: {type(error).__name__}: {error}")
        finally:
            member.checked.set()  # else `start` waits for a thread that is gone
            if member.managed is not None:
                # Before this thread ends, with which the kernel would kill the server at once.
                member.managed.stop()

    def _keep_alive(self, member: PoolMember) -> None:
        pause = 1.0
        failed_starts = 0
        while not self._stop.is_set():
            began = time.monotonic()
            problem = self._bring_up(member)
            if problem is None:
                self._in(member, "back" if member.checked.is_set() else "started")
                problem = self._watch(member)
                # A server that dies soon after each start keeps its growing pause, however well it starts.
                pause = 1.0 if time.monotonic() - began > _LONGEST_PAUSE_S else pause
            elif not member.checked.is_set():
                failed_starts += 1
            if member.refused is not None or self._stop.is_set():
                return
            self._out(member, problem or "it stopped")
            if failed_starts >= _FAILED_STARTS_AT_FIRST:
                member.checked.set()
            if member.managed is not None:
                member.managed.stop(at_once=True)
            if self._stop.wait(pause):
                return
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            member.client.reset()
            if member.managed is not None:
                member.restarts += 1

    def _bring_up(self, member: PoolMember) -> str | None:
        """Start or await the server and check it; return what is wrong with it, if anything."""
        if member.managed is not None:
            member.managed.start()
            member.client.url = member.managed.url
            member.client.reset()
        healthy = False

        def decided() -> bool:
            nonlocal healthy
            healthy = member.client.healthy(self._health_timeout_s)
            return healthy or _exit_reason(member) is not None or self._stop.is_set()

        wait_until(decided, timeout_s=self._start_timeout_s, every_s=_POLL_S, sleep=self._stop.wait)
        if healthy:
            if member.managed is not None:
                member.managed.became_healthy()
            return self._checked(member)
        if (ended := _exit_reason(member)) is not None:
            return f"did not start: {ended}"
        return "stopped" if self._stop.is_set() else f"was not healthy within {self._start_timeout_s:g} s"

    def _checked(self, member: PoolMember) -> str | None:
        """Check that the server is the run's target; refuse it for good if not; return what else is wrong with it."""
        try:
            self._check(member.client)
        except TargetError as error:
            member.refused = error
            self._out(member, f"refused: {error}")
        except ServerFailure as error:
            return f"did not answer its probe: {error}"
        return None

    def _watch(self, member: PoolMember) -> str | None:
        """Return how the server ended, once it has; None when the pool is closed or the server was refused."""
        while not self._stop.is_set() and member.refused is None:
            suspect = member.suspect.wait(_WATCH_INTERVAL_S)
            if self._stop.is_set():
                return None
            if (ended := _ended(member)) is not None:
                return ended
            if suspect:
                member.suspect.clear()
                if member.client.healthy(self._health_timeout_s):
                    problem = self._checked(member)  # it may be another server by now
                else:
                    problem = f"hangs: no good answer to a health check of {self._health_timeout_s:g} s"
                # A dying server stops answering before its process is gone, and how that ended says more.
                if problem is not None and not self._stop.wait(_POLL_S):
                    return _ended(member) or problem
        return None

    def _in(self, member: PoolMember, event: str) -> None:
        if member.refused is not None:
            member.checked.set()
            return
        logger.info("%s %s (%s)", member.name, event, member.client.url)
        with self._changed:
            self._breakers.give_back(member.name, event)
            self._changed.notify_all()
        member.suspect.clear()
        member.checked.set()

    def _out(self, member: PoolMember, reason: str) -> None:
        logger.warning("%s %s", member.name, reason)
        with self._changed:
            self._breakers.take_away(member.name, reason)
            self._changed.notify_all()


def _exit_reason(member: PoolMember) -> str | None:
    """Return how a server of ours ended; None while it runs, and for an external one."""
    return None if member.managed is None else member.managed.exit_reason()


def _ended(member: PoolMember) -> str | None:
    ended = _exit_reason(member)
    return None if ended is None else f"died: {ended}"
