"""Four nights on the whole platform: Prefect server, pools, workers, Mooncake store, training, decoding, registry."""

from __future__ import annotations

import pytest

from tests.e2e.nights import Nights

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(2400)]


def test_a_draft_is_promoted_continued_defended_against_a_worse_one_and_kept_where_nothing_is_new(
    nights: Nights,
) -> None:
    nights.arrive(0, 96)
    nights.register()

    night_1, said = nights.night("Promoted")
    assert "there is no champion yet" in said
    (first,) = nights.drafts()["versions"]
    assert (first["data"]["prompts"], first.get("parent")) == (96, None)

    nights.arrive(96, 288)
    night_2, said = nights.night("Promoted")
    assert "gate.min_gain +0.0% is kept" in said
    _, second = nights.drafts()["versions"]
    assert second["data"]["prompts"] == 288
    assert second["parent"].endswith("versions/000001")
    assert second["accept_length"] > first["accept_length"]

    nights.arrive_damaged(288, 448)
    night_3, said = nights.night("Rejected")
    assert "gate.min_gain +0.0% is missed" in said
    known = nights.drafts()
    assert (known["champion"], len(known["versions"])) == (2, 3)
    assert known["versions"][2]["parent"].endswith("versions/000002")
    assert known["versions"][2]["accept_length"] < second["accept_length"]

    _, said = nights.night("Skipped")
    assert "nothing new: 0 prompts since v3 (not promoted)" in said
    assert nights.drafts() == known

    assert "v1" in nights.in_registry("rollback", "--reason", "the test is over")
    assert nights.drafts()["champion"] == 1

    for night, decision, prompts in ((night_1, "promoted", 96), (night_2, "promoted", 240), (night_3, "rejected", 200)):
        report = nights.report_of(night)
        assert report.gate is not None
        assert (report.state, report.gate.decision) == ("completed", decision)
        assert report.accounting is not None
        assert report.accounting.prompts == prompts
        assert report.accounting.trained == report.accounting.published >= 0.95 * prompts
        assert report.archive is not None
        assert "files are what the manifest says" in nights.draftline("archive", "verify", report.archive.url)
