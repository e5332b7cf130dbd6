"""report.html: what report.md says, in one file that a browser shows without fetching anything."""

from __future__ import annotations

import base64
from html.parser import HTMLParser

import pytest

from disagg_core.report.document import AttemptFigures, GateFigures, RunReport, SuiteFigures
from disagg_core.report.figures import figures_of
from disagg_core.report.page import to_html
from disagg_core.storage.redaction import redaction_of
from tests.unit.report.test_schema import REPORT

pytestmark = pytest.mark.unit

PICTURE = b"\x89PNG and some more"
GATE = GateFigures(
    decision="rejected",
    reasons=["all: accept length 2.10 of the candidate, 2.50 of the champion"],
    criteria=[],
    suites=[
        SuiteFigures(
            suite="all",
            prompts=16,
            candidate=2.1,
            candidate_interval=(2.0, 2.2),
            incumbent=2.5,
            gain=-0.16,
            gain_interval=(-0.2, -0.12),
        )
    ],
    candidate="v3",
    incumbent="v2",
    confidence=0.95,
    seed=0,
)


class Page(HTMLParser):
    """The text of a page, and everything that a browser would fetch for it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


def page_of(report: RunReport, picture: bytes | None = PICTURE) -> str:
    return to_html(report, subtitle="EAGLE-3 draft for tiny", document="run:\n  name: night\n", picture=picture)


def a_report(**changes: object) -> RunReport:
    return RunReport.model_validate({**REPORT, **changes})


def test_the_page_says_what_the_report_says_and_a_browser_fetches_nothing_for_it() -> None:
    attempts = [AttemptFigures(attempt=1, failure_class="store_lost", reason="the owner died", incomplete=3)] * 2
    report = a_report(gate=GATE, attempts=attempts)
    html = page_of(report)
    page = Page(html)
    for figure in figures_of(report):
        assert figure.label in page.text
        assert figure.value in page.text
    for said in (
        "2.10 (2.00 to 2.20)",
        "-16.0% (-20.0% to -12.0%)",
        "store_lost: the owner died; 3 lost",
        "name: night",
    ):
        assert said in page.text
    assert page.fetched == [f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"]
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert "url(" not in html
    assert "@import" not in html


def test_what_looks_like_markup_is_shown_and_not_obeyed() -> None:
    message = "<script>alert('&amp;')</script>\n<img src=http://elsewhere/x.png>"
    page = Page(page_of(a_report(failure={"failure_class": "bug", "message": message}), picture=None))
    assert message in page.text
    assert page.fetched == []
    assert "script" not in page.tags


def test_secrets_leave_the_page_on_the_way_to_the_archive_and_its_picture_stays_as_it_is() -> None:
    chance = base64.b64decode("AKIAABCDEFGHIJKLMNOPQRST" * 2)
    report = a_report(failure={"failure_class": "bug", "message": "redis://:open-sesame@host refused"})
    redacted = redaction_of("report.html")
    assert redacted is not None
    html = page_of(report, chance)
    kept = b"".join(redacted([html.encode()])).decode()
    assert "open-sesame" in html
    assert "open-sesame" not in kept
    assert Page(kept).fetched == Page(html).fetched
