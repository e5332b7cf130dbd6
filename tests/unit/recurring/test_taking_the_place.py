"""Whose place a candidate takes: the champion's that it was judged against, and no other's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from disagg_core.recurring.candidate import Candidate, Incumbent
from disagg_core.recurring.promotion import promote, to_be_replaced
from disagg_core.registry.references import open_registry
from disagg_core.registry.registry import Registry
from disagg_core.report.document import GateFigures
from disagg_core.run.plan import RunPlan
from disagg_core.settings import Settings
from tests.integration.registry.kit import make_draft, provenance
from tests.unit.recurring.test_judgement import plan_of

pytestmark = pytest.mark.unit

APPROVED = GateFigures(
    decision="promoted",
    reasons=["approved by a person"],
    criteria=[],
    suites=[],
    candidate="v3",
    incumbent=None,
    confidence=0.95,
    seed=0,
)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def plan(tmp_path: Path) -> RunPlan:
    return plan_of(tmp_path / "run")


@pytest.fixture
def registry(plan: RunPlan, settings: Settings, tmp_path: Path) -> Registry:
    """Two versions for the run's target, v1 and v2, the candidate v3, and v4 for another target; no champion yet."""
    opened = open_registry(plan.spec, settings)
    for number, target in enumerate([plan.target.version] * 3 + ["another"], start=1):
        draft = make_draft(tmp_path / f"draft-{number}", number)
        opened.publish(draft, provenance(f"night-{number}", target_version=target))
    return opened


@pytest.fixture
def judged(plan: RunPlan, settings: Settings, registry: Registry) -> Callable[[int | None], Candidate]:
    """Make a version the champion, and judge the candidate while it is."""

    def judge(number: int | None) -> Candidate:
        incumbent = None
        if number is not None:
            registry.promote(number, instead_of=None, by="us")
            incumbent = None if number == 4 else Incumbent(number, Path())
        return Candidate(number=3, replaces=to_be_replaced(plan, settings, incumbent), gate=APPROVED)

    return judge


@pytest.mark.parametrize("champion", [None, 1, 4], ids=["none", "of the target", "of another target"])
def test_the_champion_that_was_there_when_it_was_judged_is_replaced(
    plan: RunPlan, settings: Settings, registry: Registry, judged: Callable[[int | None], Candidate], champion: int
) -> None:
    assert promote(plan, settings, judged(champion)).gate.decision == "promoted"
    last = registry.history()[-1]
    assert (last.version, last.previous) == (3, champion)


@pytest.mark.parametrize("meanwhile", [2, 4], ids=["of the target", "of another target"])
@pytest.mark.parametrize(("champion", "named"), [(None, "none"), (1, "v1")])
def test_another_one_is_not_and_both_are_named(
    plan: RunPlan,
    settings: Settings,
    registry: Registry,
    judged: Callable[[int | None], Candidate],
    champion: int | None,
    named: str,
    meanwhile: int,
) -> None:
    candidate = judged(champion)
    registry.promote(meanwhile, instead_of=champion, by="somebody")

    found = promote(plan, settings, candidate).gate
    assert found.decision == "rejected"
    assert found.reasons[0] == "approved by a person"
    assert f"v3 was to take the place of {named}, but somebody promoted v{meanwhile}" in found.reasons[1]
    assert registry.history()[-1].version == meanwhile


def test_whoever_has_promoted_the_candidate_itself_has_done_what_was_to_be_done(
    plan: RunPlan, settings: Settings, registry: Registry, judged: Callable[[int | None], Candidate]
) -> None:
    candidate = judged(1)
    registry.promote(3, instead_of=1, by="somebody")
    assert promote(plan, settings, candidate) == candidate
    assert len(registry.history()) == 2
