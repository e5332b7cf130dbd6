"""A run from its first sample to its last: both roles as processes, killed at random moments and set going again.

Real: both roles with their files, the target, the store and the channel. They are forked from a process that has torch
imported, which would take each of them seconds. Played by the test: the parent flow, which restarts a producer that
died within its attempt, and begins another attempt on an empty store after a dead consumer.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from disagg_core.run.metrics import read_metrics
from disagg_core.run.plan import RoleAssignment, RunPlan
from disagg_core.store import MooncakeFeatureStore
from disagg_core.store.endpoints import StoreEndpoints
from tasks.roles import Role, hand_over_cursor
from tests.integration.forks import forked

BOTH: tuple[Role, ...] = ("producer", "consumer")
_LIMIT_S = 240.0


@dataclass(frozen=True)
class Kill:
    """SIGKILL for `victims`, `delay_s` after the run has first come to `step`; step 0 is before the first one."""

    victims: tuple[Role, ...]
    step: int
    delay_s: float

    @classmethod
    def at_random(cls, victims: tuple[Role, ...], steps: int, count: int, seed: int) -> list[Kill]:
        """Return `count` kills at seeded moments of a run of so many steps, and print them."""
        drawn = random.Random(seed)
        moments = sorted(drawn.sample(range(steps), count))
        kills = [cls(victims, step, round(drawn.uniform(0, 0.4), 3)) for step in moments]
        print(f"seed {seed}: {kills}")  # with the output of a test that fails
        return kills


@dataclass
class Night:
    """One run with its attempts."""

    plan: RunPlan
    endpoints: StoreEndpoints
    attempt: int = 0
    restarts: int = 0
    struck: list[tuple[Kill, list[Role]]] = field(default_factory=list)
    _roles: dict[Role, ForkServerProcess] = field(default_factory=dict)

    def run(self, kills: Sequence[Kill] = ()) -> None:
        """Attempt the run until both roles have completed, with `kills` in their order."""
        waiting = list(kills)
        deadline = time.monotonic() + _LIMIT_S
        try:
            while not self._attempted(waiting, deadline):
                pass
        finally:
            for role in self._roles.values():
                role.kill()
                role.join()
            self._sweep()
        assert not waiting, f"the run was over before {waiting}"

    def _attempted(self, waiting: list[Kill], deadline: float) -> bool:
        """Run one attempt; return whether it completed."""
        self.attempt += 1
        self._sweep()
        hand_over_cursor(self._assignment)
        for role in BOTH:
            self._start(role)
        while self._roles["consumer"].exitcode is None or self._roles["producer"].exitcode is None:
            assert time.monotonic() < deadline, self._logs()
            if waiting and self._step() >= waiting[0].step:
                self._strike(waiting.pop(0))
            if self._roles["consumer"].exitcode not in (None, 0):
                self._roles["producer"].kill()
                self._roles["producer"].join()
                assert self.attempt <= len(self.struck), self._logs()
                return False
            if self._roles["producer"].exitcode not in (None, 0):
                self.restarts += 1
                assert self.restarts <= len(self.struck), self._logs()
                self._start("producer")
            threading.Event().wait(0.01)
        assert self._roles["producer"].exitcode == 0, self._logs()
        assert self._roles["consumer"].exitcode in (0, -9), self._logs()
        return self._roles["consumer"].exitcode == 0

    def _strike(self, kill: Kill) -> None:
        threading.Event().wait(kill.delay_s)
        alive: list[Role] = [role for role in kill.victims if self._roles[role].exitcode is None]
        for role in alive:
            self._roles[role].kill()
        for role in alive:
            self._roles[role].join()
        self.struck.append((kill, alive))

    @property
    def _assignment(self) -> RoleAssignment:
        return RoleAssignment(plan=self.plan, attempt=self.attempt, store=self.endpoints)

    def _step(self) -> int:
        steps = [record["step"] for record in read_metrics(self.plan.dir.metrics / "train.jsonl")]
        return max((step for step in steps if isinstance(step, int)), default=0)

    def _start(self, role: Role) -> None:
        document = self._assignment.dir.state / f"{role}-assignment.json"
        document.parent.mkdir(parents=True, exist_ok=True)
        document.write_text(self._assignment.model_dump_json())
        self._roles[role] = forked(f"disagg_core.roles.{role}", [str(document)], self._log(role))

    def _sweep(self) -> None:
        with MooncakeFeatureStore(self.endpoints, namespace=self.plan.run_id) as store:
            store.sweep(f"{self.plan.run_id}/")

    def _log(self, role: Role) -> Path:
        return self._assignment.dir.state / f"{role}.log"

    def _logs(self) -> str:
        return "\n".join(f"{role}: {self._log(role).read_text()[-4000:]}" for role in BOTH)
