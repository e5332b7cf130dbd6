"""Leases: under any schedule of failures, expiries and restarts no prompt is lost and none is doubled."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from disagg_core.ordinals import OrdinalSet
from disagg_core.rollout.leases import LeaseBook

pytestmark = pytest.mark.unit

END, GROUP, ATTEMPTS, LEASE_S = 17, 4, 3, 10.0


class LeaseMachine(RuleBasedStateMachine):
    """Workers come and go, answer late or never; the producer process dies and starts again.

    The model: what was accepted as done or rejected over all processes, and how often each prompt has failed.
    """

    def __init__(self):
        super().__init__()
        self.now = 0.0
        self.accepted = Counter()
        self.checkpoint = OrdinalSet()
        self.start_process()

    def start_process(self):
        self.held = []
        self.failures = Counter()
        self.book = LeaseBook(
            end=END, skip=self.checkpoint, max_attempts=ATTEMPTS, lease_s=LEASE_S, clock=lambda: self.now
        )
        self.accepted = Counter(dict.fromkeys(self.checkpoint, 1))

    @rule(worker=st.sampled_from("abc"))
    def take_new(self, worker):
        first = self.book.next_unseen
        if first is not None:
            self.held += self.book.take_unseen(worker, (first // GROUP + 1) * GROUP)

    @rule(worker=st.sampled_from("abc"))
    def take_returned(self, worker):
        lease = self.book.take_waiting(worker)
        if lease is not None:
            assert lease.failures == self.failures[lease.ordinal]
            self.held.append(lease)

    def pick(self, data):
        return self.held.pop(data.draw(st.integers(0, len(self.held) - 1))) if self.held else None

    @rule(data=st.data(), keep=st.booleans())
    def answer(self, data, keep):
        """Complete a lease; sometimes answer for it a second time later, as a worker that was thought dead does."""
        lease = self.pick(data)
        if lease is not None:
            in_force = self.book.holds(lease)
            assert self.book.complete(lease) == in_force
            self.accepted[lease.ordinal] += in_force
            if keep:
                self.held.append(lease)

    @rule(data=st.data())
    def fail(self, data):
        lease = self.pick(data)
        if lease is not None:
            in_force = self.book.holds(lease)
            quarantined = self.book.fail(lease, "broke", f"server-{lease.worker}")
            self.failures[lease.ordinal] += in_force
            assert quarantined == (in_force and self.failures[lease.ordinal] == ATTEMPTS)
            self.accepted[lease.ordinal] += quarantined

    @rule(data=st.data())
    def give_back(self, data):
        lease = self.pick(data)
        if lease is not None:
            self.book.give_back(lease)

    @rule(seconds=st.sampled_from([1.0, 11.0]))
    def time_passes(self, seconds):
        self.now += seconds
        for lease, quarantined in self.book.expire():
            self.failures[lease.ordinal] += 1
            self.accepted[lease.ordinal] += quarantined

    @rule()
    def restart_from_a_checkpoint(self):
        """The process dies; the next one knows what a checkpoint covers, the rest is captured again."""
        for ordinal in self.book.done:
            if ordinal % 2:
                self.checkpoint.add(ordinal)
        self.start_process()

    @invariant()
    def nothing_is_doubled(self):
        assert not [ordinal for ordinal, times in self.accepted.items() if times > 1]

    @invariant()
    def every_prompt_is_in_one_place(self):
        book = self.book
        unseen = len(book.upcoming(END))
        assert unseen + book.leased + book.waiting + len(book.done) + len(book.rejected) + len(self.checkpoint) == END

    @invariant()
    def drained_means_all_answered(self):
        assert self.book.drained == (sum(self.accepted.values()) == END)

    def teardown(self):
        """Whatever has happened, patient workers finish the run."""
        self.now += LEASE_S + 1
        for lease, quarantined in self.book.expire():
            self.accepted[lease.ordinal] += quarantined
        while not self.book.drained:
            first = self.book.next_unseen
            leases = self.book.take_unseen("z", first + 1) if first is not None else [self.book.take_waiting("z")]
            for lease in leases:
                assert self.book.complete(lease)
                self.accepted[lease.ordinal] += 1
        assert self.accepted == Counter(range(END))


LeaseMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLeases = LeaseMachine.TestCase


def book(**options):
    return LeaseBook(**{"end": 10, "max_attempts": 3, "lease_s": 10.0, "clock": lambda: 0.0, **options})


def test_what_came_back_goes_out_before_what_is_new_and_names_servers_to_avoid():
    leases = book()
    first, second = leases.take_unseen("a", 2)
    leases.fail(second, "broke", "server-1")
    leases.give_back(first)
    again = leases.take_waiting("b")
    assert (again.ordinal, again.failures, again.avoid) == (0, 0, frozenset())
    again = leases.take_waiting("b")
    assert (again.ordinal, again.failures, again.avoid) == (1, 1, frozenset({"server-1"}))


def test_only_one_suspect_is_out_at_a_time():
    leases = book()
    for lease in leases.take_unseen("a", 4):
        leases.fail(lease, "the server died", "server-1")
    suspect = leases.take_waiting("a")
    assert leases.take_waiting("b") is None
    leases.complete(suspect)
    assert leases.take_waiting("b").ordinal == 1


def test_prompts_of_a_stream_of_unknown_length_end_where_it_ends():
    leases = book(end=None)
    leases.take_unseen("a", 3)
    leases.set_end(2 + 1)
    assert leases.next_unseen is None


def test_skipped_prompts_never_go_out():
    leases = book(skip=OrdinalSet([(0, 3), (6, 6)]))
    leases.skip_done([4])
    leases.skip_rejected([5])
    assert [lease.ordinal for lease in leases.take_unseen("a", 10)] == [7, 8, 9]
    assert len(leases.rejected) == 1


def test_after_a_crash_the_suspects_come_back_in_growing_groups_and_not_one_by_one():
    leases = book(end=64)
    for lease in leases.take_unseen("a", 64):
        leases.fail(lease, "the server died", "server-1")
    rounds = []
    while not leases.drained:
        out = []
        while (lease := leases.take_waiting("b")) is not None:
            out.append(lease)
        rounds.append(len(out))
        for lease in out:
            assert leases.complete(lease)
    assert rounds[:5] == [1, 2, 8, 16, 16]
    assert len(rounds) <= 8


def test_a_poisonous_prompt_among_the_suspects_costs_no_neighbour_its_last_attempt():
    leases, poison = book(end=40), {9, 10, 23}
    for lease in leases.take_unseen("a", 40):
        leases.fail(lease, "the server died", "server-1")
    while not leases.drained:
        out = []
        while (lease := leases.take_waiting("b")) is not None:
            out.append(lease)
        dies = any(lease.ordinal in poison for lease in out)
        for lease in out:
            leases.fail(lease, "the server died", "server-1") if dies else leases.complete(lease)
    assert set(leases.rejected) == poison
    assert len(leases.done) == 37
