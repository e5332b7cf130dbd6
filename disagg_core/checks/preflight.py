"""Everything that is checked before a process is started or a GPU is held, and the plan that comes of it.

Three depths: `sketch_plan` needs the target's config, the prompts and where results go; `check_run` also the tokenizer,
every line of the prompts, this machine and the services of others; `prepare_run` also writes what the roles need into
the run's directory. Whatever is found is told at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from disagg_core.checks.draft import check_draft
from disagg_core.checks.findings import Findings
from disagg_core.checks.resources import check_disk
from disagg_core.checks.services import check_channel, check_external_store, check_registry, check_servers
from disagg_core.checks.suites import check_suites
from disagg_core.drafts.export import import_draft
from disagg_core.drafts.method import DraftConfig
from disagg_core.drafts.vocab import VocabMap
from disagg_core.drafts.warm_start import read_warm_start
from disagg_core.errors import BadInput, IncompatibleDraft, TargetError, Transient
from disagg_core.files import write_atomically
from disagg_core.prompts.checks import PromptFacts, validate_prompts
from disagg_core.registry.references import References
from disagg_core.report.archive import archive_base, probe_archive
from disagg_core.run.devices import check_shared_node
from disagg_core.run.directory import RunDir
from disagg_core.run.known import read_plan
from disagg_core.run.plan import PlannedDraft, RunPlan, make_plan
from disagg_core.run.warm_start import WarmStart
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.section import is_local
from disagg_core.settings import Settings
from disagg_core.store import require_mooncake
from disagg_core.store.capacity import check_capacity
from disagg_core.target.facts import TargetFacts, read_target_facts
from disagg_core.target.parts import check_target_parts
from disagg_core.target.tokenizer import load_tokenizer, version_in_use
from disagg_core.tracking.trackers import check_trackers

logger = logging.getLogger(__name__)


def sketch_plan(spec: RunSpec, settings: Settings) -> RunPlan:
    """Return the plan of `spec` as far as it can be known without weights and tokenizer.

    Raises:
        BadInput: the target's config, the prompts, the archive, the registry or the numbers of the spec are wrong.
    """
    findings = Findings()
    run_id = f"{spec.run.name}-plan"
    facts = findings.of(lambda: read_target_facts(spec.target))
    plan, _ = _resolved(findings, spec, settings, run_id, facts)
    findings.of(lambda: _archive(spec, settings))
    findings.of(lambda: check_registry(spec, settings))
    if plan is not None and _starts_known(plan):
        findings.of(lambda: draft_configs(plan))
    findings.raise_all()
    assert plan is not None
    return plan


def check_run(spec: RunSpec, settings: Settings, run_id: str | None = None) -> RunPlan:
    """Check that the run can be started from this machine and return its plan; leaves nothing behind.

    Raises:
        BadInput: something in the spec, its files, the target, the archive, the registry, the services that it names
            or this machine is wrong. The message has all that was found.
    """
    return _checked(spec, settings, run_id or f"{spec.run.name}-check")[0]


def check_gpus(spec: RunSpec) -> None:
    """Check that the roles have GPUs of their own; for a run whose roles are all on this machine.

    Raises:
        BadInput: two would have the same one, or one that is not there.
    """
    check_shared_node(spec, torch.cuda.device_count())


def prepare_run(spec: RunSpec, run_id: str, settings: Settings, also: Sequence[Callable[[], object]] = ()) -> RunPlan:
    """Check the run, write run.json and the evaluation prompts into its directory, and return its plan.

    A run that was planned before keeps the data and the target's revision that it was planned with. What the checks in
    `also` raise is told together with the rest.

    Raises:
        BadInput: as `check_run`; or the directory holds a run of another spec.
        DataChanged: the data is not what the run was planned with.
    """
    run_dir = RunDir.of(settings.runs_dir, run_id)
    known = read_plan(run_dir) if run_dir.document.is_file() else None
    if known is not None:
        spec = _as_planned(spec, known)
    plan, prompts = _checked(spec, settings, run_id, known, also)
    write_atomically(plan.dir.document, plan.model_dump_json(indent=2))
    if spec.evaluation.prompts:
        write_atomically(plan.dir.evaluation / "prompts.jsonl", prompts.evaluated)
    return plan


def _checked(
    spec: RunSpec,
    settings: Settings,
    run_id: str,
    known: RunPlan | None = None,
    also: Sequence[Callable[[], object]] = (),
) -> tuple[RunPlan, PromptFacts]:
    findings = Findings()
    findings.of(require_mooncake)
    facts = findings.of(lambda: read_target_facts(spec.target))
    tokenizer = None
    if facts is not None:
        findings.of(lambda: _check_weights(spec))
        tokenizer = findings.of(lambda: load_tokenizer(spec.target))
    if spec.store.mode == "managed":
        findings.of(lambda: check_capacity(spec.store.capacity))
    plan, prompts = _resolved(findings, spec, settings, run_id, facts, tokenizer, known)
    archive = findings.of(lambda: _archive(spec, settings))
    registry = findings.of(lambda: check_registry(spec, settings))
    findings.of(lambda: check_trackers(spec.tracking))
    findings.of(lambda: check_channel(spec, settings))
    findings.of(lambda: check_external_store(spec))
    if plan is not None:
        findings.of(lambda: check_servers(plan))
        for draft in plan.drafts:
            if unserved := draft.method.unserved(plan.target):
                logger.warning("%s", unserved)
        configs = findings.of(lambda: draft_configs(plan)) if _starts_known(plan) else None
        if configs is not None:
            findings.of(lambda: check_disk(plan, configs, archive=archive, registry=registry))
            tokens = prompts.tokens if prompts is not None else frozenset()
            for draft, config in configs:
                findings.of(partial(check_draft, draft.method, config, spec, tokens))
    for check in also:
        findings.of(check)
    findings.raise_all()
    assert plan is not None
    assert prompts is not None
    return plan, prompts


def _resolved(
    findings: Findings,
    spec: RunSpec,
    settings: Settings,
    run_id: str,
    facts: TargetFacts | None,
    tokenizer: Any | None = None,
    known: RunPlan | None = None,
) -> tuple[RunPlan | None, PromptFacts | None]:
    """Return plan and facts of the prompts; None for what could not be found out.

    What was found out when the run was planned before, as `known`, is not asked again.
    """
    pinned = known.data if known is not None else None
    prompts = findings.of(lambda: validate_prompts(spec, tokenizer, facts, pinned))
    suites = findings.of(lambda: check_suites(spec, tokenizer, facts, pinned))
    warm_starts = findings.of(lambda: _find_warm_starts(spec, settings, known.warm_starts if known is not None else {}))
    if facts is None:
        return None, prompts

    def plan() -> RunPlan:
        version = ""
        if tokenizer is not None:
            version = version_in_use(tokenizer, spec.data)
        return make_plan(
            _pinned(spec, facts),
            facts,
            run_id=run_id,
            root=RunDir.of(settings.runs_dir, run_id).root,
            total_prompts=prompts.total if prompts is not None else None,
            tokenizer_version=version,
            data=prompts.data.model_copy(update={"suites": suites or {}}) if prompts is not None else None,
            warm_starts=warm_starts,
        )

    return findings.of(plan), prompts


def _archive(spec: RunSpec, settings: Settings) -> str:
    """Return where the archives lie, once something could be written there."""
    base = archive_base(spec.archive, settings)
    probe_archive(base)
    return base


def _find_warm_starts(spec: RunSpec, settings: Settings, known: Mapping[str, WarmStart]) -> dict[str, WarmStart]:
    """Return the drafts that the run continues: those that it was planned with, or what the document means by now.

    Raises:
        BadInput: there is no such draft, or it cannot be read; of several, every one is named.
    """
    found: dict[str, WarmStart] = {}
    faults = []
    for reference in dict.fromkeys(section.init_from for section in spec.all_drafts if section.init_from is not None):
        try:
            found[reference] = _find_warm_start(reference, spec, settings, known.get(reference))
        except (BadInput, Transient) as error:
            faults.append(f"draft.init_from: {error}")
    if faults:
        raise IncompatibleDraft("; ".join(faults))
    return found


def _find_warm_start(reference: str, spec: RunSpec, settings: Settings, known: WarmStart | None) -> WarmStart:
    draft = References.of(spec, settings).find(known.pinned if known is not None else reference)
    size = import_draft(draft.path).config.draft_vocab_size
    return WarmStart(reference=reference, pinned=draft.pinned, path=draft.path, draft_vocab_size=size)


def _starts_known(plan: RunPlan) -> bool:
    """Tell whether every draft that the run continues was found; one that was not has been told already."""
    return all(draft.section.init_from is None or draft.warm_start is not None for draft in plan.drafts)


def draft_configs(plan: RunPlan) -> list[tuple[PlannedDraft, DraftConfig]]:
    """Return the run's drafts, each with its config, fresh or continued.

    Raises:
        IncompatibleDraft: a draft to continue from does not fit.
    """
    return [(draft, _draft_config(draft)) for draft in plan.drafts]


def _draft_config(draft: PlannedDraft) -> DraftConfig:
    """Return the config of a fresh draft, or of one that is continued as the trainer will continue it."""
    section, target, size = draft.section, draft.target, draft.vocabulary.size
    if draft.init_path is None:
        return draft.method.config_for(section, target, draft.capture, size)
    _, config, state = read_warm_start(draft.init_path, section, target, draft.capture)
    vocab = VocabMap.from_counts(torch.zeros(target.vocab_size), size)  # any of the same size
    return draft.method.continued(config, state, target, draft.capture, vocab).config


def _as_planned(spec: RunSpec, known: RunPlan) -> RunSpec:
    """Return the spec that the run was planned with, if it is `spec` but for the revision that was fixed then.

    Raises:
        BadInput: it is another one.
    """
    revision = {"revision": known.spec.target.revision}
    if spec.target.revision is None and known.target.commit is not None:
        spec = spec.model_copy(update={"target": spec.target.model_copy(update=revision)})
    if known.spec != spec:
        raise BadInput(f"run {known.run_id} exists with another spec in {known.root}; choose another run.name")
    return spec


def _pinned(spec: RunSpec, facts: TargetFacts) -> RunSpec:
    """Return `spec` with a hub model's revision fixed to the commit it is now, so that all roles load the same one."""
    if facts.commit is None:
        return spec
    return spec.model_copy(update={"target": spec.target.model_copy(update={"revision": facts.commit})})


def _check_weights(spec: RunSpec) -> None:
    """Refuse a local target without weights, or without what drafts need of them, unless a server has them."""
    model = spec.target.model
    if not is_local(model) or spec.target.server_urls:
        return
    if not any(Path(model).expanduser().glob("*.safetensors")):
        raise TargetError(f"target.model: {model} holds no *.safetensors weights; save the model in safetensors format")
    check_target_parts(spec.target)
