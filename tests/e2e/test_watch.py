"""The watch over a server that serves the champion, on the whole platform: from its metrics to a run on demand."""

from __future__ import annotations

import json

import pytest

from disagg_core.recurring.night import assess
from disagg_core.recurring.preparation import situation_of
from disagg_core.registry.references import open_registry, registry_name
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import Settings
from tests.e2e.nights import Nights
from tests.integration.registry.kit import make_draft, provenance
from tests.unit.recurring.test_watch import SGLANG, VLLM, serving

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(2400)]

PROMOTED_WITH = 3.7
"""Accept length of the champion; the servers of the metrics' samples accept 3.0 and 3.4."""


@pytest.fixture
def champion(nights: Nights) -> str:
    """A champion that was trained on all the prompts there are, of a draft that nobody loads here."""
    nights.arrive(0, 64)
    nights.register()
    spec, settings = load_spec(nights.document), Settings(home=nights.platform.home)
    registry, situation = open_registry(spec, settings), situation_of(spec)
    made = provenance(
        "by-hand",
        target=spec.target.model,
        target_version=situation.target_version,
        tokenizer_version=situation.tokenizer_version,
        draft_vocab_size=situation.draft_vocab_size,
        layers=situation.layers,
        data=assess(spec, registry, situation, cache=settings.home / "sources").mark,
        accept_length=PROMOTED_WITH,
    )
    version = registry.publish(make_draft(nights.registry.with_name("draft")), made)
    registry.promote(version.number, instead_of=None, by="test")
    return registry_name(spec)


def test_a_server_that_accepts_less_than_the_champion_did_starts_a_run_on_demand(nights: Nights, champion: str) -> None:
    with serving(VLLM) as healthy:
        nights.await_state(nights.start("draft-watch/watch", server=healthy, drop=0.1), "Completed")
    assert nights.runs_of("on-demand") == []

    with serving(SGLANG) as dull:
        for _ in range(2):  # two looks at the same drop
            nights.await_state(nights.start("draft-watch/watch", server=dull, drop=0.1), "Completed")
    (event,) = nights.events("draftline.accept_length.dropped")
    assert event["resource"]["prefect.resource.id"] == f"draftline.draft.{champion}"
    assert event["payload"]["reason"] == f"3.000 on {dull}, 3.700 when v1 was promoted"

    (run,) = nights.await_runs_of("on-demand", 1)
    assert run["created_by"]["type"] == "AUTOMATION", json.dumps(run["created_by"])
    assert "nothing new: 0 prompts since v1 (the champion)" in nights.await_state(run["id"], "Skipped")["message"]
    assert len(nights.events("draftline.accept_length.dropped")) == len(nights.runs_of("on-demand")) == 1
