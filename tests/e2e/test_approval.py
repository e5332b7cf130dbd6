"""A night whose draft waits for a person, who answers at the command line, on the whole platform."""

from __future__ import annotations

import pytest

from tests.e2e.nights import ALWAYS_ASKED, Nights

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3300)]


def test_a_draft_is_approved_and_the_next_one_rejected_at_the_command_line(nights: Nights) -> None:
    nights.arrive(0, 64)
    nights.register(*ALWAYS_ASKED)
    first, _ = nights.night("Suspended")
    assert nights.holds_nothing(first)
    assert nights.drafts()["champion"] is None
    waiting = nights.report_of(first)
    assert set(waiting.roles) == {"producer", "consumer"}
    assert [attempt.failure_class for attempt in waiting.attempts] == [None]

    said = nights.draftline("drafts", "approve", nights.run_id(first), "--comment", "a beginning")
    assert "approve; it goes on" in said
    assert "approved by a person: a beginning" in nights.await_state(first, "Promoted")["message"]
    assert nights.drafts()["champion"] == 1
    (event,) = nights.history()
    assert "approved by a person: a beginning" in event["reason"]
    report = nights.report_of(first)
    assert (report.attempts, report.roles) == (waiting.attempts, waiting.roles)
    assert report.seconds > waiting.seconds
    told = [event["resource"]["prefect.resource.id"] for event in nights.events("draftline.run.needs-approval")]
    assert told.count(f"draftline.run.{nights.run_id(first)}") == 1
    said = nights.refused("drafts", "approve", nights.run_id(first))
    assert "expected a run that waits for approval, found one that is Promoted" in " ".join(said.split())

    nights.arrive(64, 128)
    second, _ = nights.night("Suspended")
    nights.draftline("drafts", "reject", nights.run_id(second), "--comment", "too little")
    assert "rejected by a person: too little" in nights.await_state(second, "Rejected")["message"]
    assert (nights.drafts()["champion"], len(nights.drafts()["versions"]), len(nights.history())) == (1, 2, 1)
    report = nights.report_of(second)
    assert set(report.roles) == {"producer", "consumer"}
    assert report.gate is not None
    assert (report.state, report.gate.decision) == ("completed", "rejected")
    assert report.gate.reasons[-1] == "rejected by a person: too little"
