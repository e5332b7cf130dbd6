"""A night whose draft waits for a person, who answers in the form of its run in a browser, on the whole platform."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import choose, chromium_page, form_of
from tests.e2e.nights import ALWAYS_ASKED, Nights

pytestmark = [pytest.mark.e2e, pytest.mark.ui, pytest.mark.timeout(3300)]

COMMENT = "Read ten of its answers; none is worse."


def test_a_draft_is_approved_in_the_form_of_its_run(nights: Nights, tmp_path: Path) -> None:
    nights.arrive(0, 64)
    nights.register(*ALWAYS_ASKED)
    night, _ = nights.night("Suspended")
    assert nights.holds_nothing(night)
    assert nights.drafts()["champion"] is None
    gate = nights.report_of(night).gate
    assert gate is not None
    measured = gate.suites[0]

    with chromium_page() as page:
        form = form_of(page, nights.page_of(night), "needs your approval")
        shown = form.inner_text()
        said = (
            f"v1 of run {nights.run_id(night)}",
            f"accept length {measured.candidate:.3f}",
            f"on {measured.prompts} prompts",
            "there is no champion yet",
            "reject: the champion stays",
        )
        assert all(fact in shown for fact in said), shown
        choose(page, form, "approve")
        form.get_by_role("textbox").fill(COMMENT)
        page.screenshot(path=tmp_path / "form.png")
        form.get_by_role("button", name="Submit").click()
        form.wait_for(state="hidden")

    assert f"approved by a person: {COMMENT}" in nights.await_state(night, "Promoted")["message"]
    assert nights.drafts()["champion"] == 1
    (event,) = nights.history()
    assert COMMENT in event["reason"]
    with chromium_page() as page:
        page.goto(nights.page_of(night))
        page.get_by_text("Promoted").first.wait_for()
        page.screenshot(path=tmp_path / "promoted.png")
        page.get_by_text("Artifacts", exact=True).click()
        page.get_by_text(f"Report of run {nights.run_id(night)}").first.wait_for()
        page.screenshot(path=tmp_path / "artifacts.png")
