"""Taking a run's draft into service: publishing it, comparing it with the champion, moving the champion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from disagg_core.errors import BadInput
from disagg_core.recurring.candidate import INCUMBENT, Candidate, Incumbent, decided
from disagg_core.recurring.night import Night
from disagg_core.registry.gate import Decoded, PairedPrompt, decide
from disagg_core.registry.publishing import publish_draft
from disagg_core.registry.references import References, open_registry
from disagg_core.registry.registry import whoami
from disagg_core.registry.versions import ChampionMoved, DataMark, Version
from disagg_core.run.known import read_document
from disagg_core.run.plan import RunPlan
from disagg_core.run_spec.results import HELD_OUT
from disagg_core.settings import Settings


def incumbent_of(plan: RunPlan, settings: Settings) -> Incumbent | None:
    """Return the champion, if it was made for the target that the run has; none to compare with otherwise.

    Raises:
        TreeDamaged, StorageFailed, StorageUnusable: it cannot be fetched.
    """
    champion = open_registry(plan.spec, settings).champion()
    if champion is None or champion.provenance.target_version != plan.target.version:
        return None
    return Incumbent(champion.number, References.of(plan.spec, settings).find(champion.label).path)


def publish(plan: RunPlan, settings: Settings, *, checkpoint: Path, archive: str) -> Version:
    """Keep the draft in `checkpoint`, whose training and evaluation are complete, as a version; return it.

    Raises:
        VersionExists: the run has a version with other weights.
        StorageFailed, StorageUnusable: the registry does not answer.
    """
    draft = plan.drafts[0]
    return publish_draft(
        open_registry(plan.spec, settings),
        plan,
        draft,
        checkpoint,
        accept_length=_result(plan, draft.result_name("after"))["accept_length"],
        archive=archive,
        mark=_mark_of(plan),
    )


def to_be_replaced(plan: RunPlan, settings: Settings, incumbent: Incumbent | None) -> int | None:
    """Return the champion whose place the run's draft may take; see `Candidate.replaces`.

    Raises:
        StorageFailed, StorageUnusable: the registry does not answer.
    """
    if incumbent is not None:
        return incumbent.number
    champion = open_registry(plan.spec, settings).champion()
    of_another = champion is not None and champion.provenance.target_version != plan.target.version
    return champion.number if champion is not None and of_another else None


def judge(plan: RunPlan, published: Version, incumbent: Incumbent | None, *, replaces: int | None) -> Candidate:
    """Return what the gate decides about a version, by the results in the run's directory.

    `replaces` is the champion whose place it is to take (`to_be_replaced`).

    Raises:
        BadInput: what the gate needs was not measured.
    """
    after = _result(plan, plan.drafts[0].result_name("after"))
    other = _result(plan, INCUMBENT) if incumbent is not None else None
    own, theirs = _by_suite(after), _by_suite(other) if other is not None else None
    gate = decide(
        plan.spec.gate,
        [pair for suite in own for pair in _pairs(suite, own[suite], theirs[suite] if theirs is not None else None)],
        candidate=published.label,
        incumbent=f"v{incumbent.number}" if incumbent is not None else None,
        lossless=after["lossless"],
        seed=plan.spec.run.seed,
    )
    return Candidate(number=published.number, replaces=replaces, gate=gate)


def _by_suite(result: dict[str, Any]) -> dict[str, list[tuple[int, int]]]:
    """Return tokens and passes of each prompt, by suite."""
    suites = {name: suite["by_question"] for name, suite in result.get("suites", {}).items()}
    return {**suites, HELD_OUT: result["by_prompt"]}


def _pairs(suite: str, own: list[tuple[int, int]], theirs: list[tuple[int, int]] | None) -> list[PairedPrompt]:
    other = [Decoded(*pair) for pair in theirs] if theirs is not None else [None] * len(own)
    return [
        PairedPrompt(suite, str(number), Decoded(*pair), beside)
        for number, (pair, beside) in enumerate(zip(own, other, strict=True))
    ]


def promote(plan: RunPlan, settings: Settings, candidate: Candidate, by: str | None = None) -> Candidate:
    """Make a candidate the champion; return it rejected if the champion is another than the one it was judged against.

    Raises:
        StorageFailed, StorageUnusable: the registry does not answer.
    """
    registry = open_registry(plan.spec, settings)
    if (champion := registry.champion()) is not None and champion.number == candidate.number:
        return candidate  # an earlier process of the run came so far
    try:
        reason = "; ".join(candidate.gate.reasons)
        registry.promote(candidate.number, instead_of=candidate.replaces, by=by or whoami(), reason=reason)
    except ChampionMoved as error:
        return decided(candidate, "rejected", str(error))
    return candidate


def _mark_of(plan: RunPlan) -> DataMark | None:
    return read_document(plan.dir.night, Night).mark if plan.dir.night.is_file() else None


def _result(plan: RunPlan, name: str) -> dict[str, Any]:
    path = plan.dir.evaluation / f"{name}.json"
    if not path.is_file():
        raise BadInput(f"{path}: expected what the evaluation measured, found no such file")
    found: dict[str, Any] = msgspec.json.decode(path.read_bytes())
    return found
