"""Finding out, once for all processes of a run, what a night of recurring training is."""

from __future__ import annotations

from disagg_core.drafts.together import capture_for
from disagg_core.files import write_atomically
from disagg_core.recurring.night import Night, Situation, plan_night
from disagg_core.registry.references import open_registry
from disagg_core.run.directory import RunDir
from disagg_core.run.known import read_document
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.draft import ReducedVocabulary
from disagg_core.settings import Settings
from disagg_core.target.facts import read_target_facts
from disagg_core.target.tokenizer import load_tokenizer, version_in_use


def prepare_night(spec: RunSpec, run: RunDir, settings: Settings) -> Night:
    """Return what the night of `run` is: as an earlier process of the run found it, or found out now and written down.

    Raises:
        BadInput: target, tokenizer or source of the prompts cannot be read.
        StorageFailed, StorageUnusable: registry or source do not answer.
    """
    if run.night.is_file():
        return read_document(run.night, Night)
    night = plan_night(
        spec,
        open_registry(spec, settings),
        situation_of(spec),
        prompts=run.night_prompts,
        cache=settings.home / "sources",
    )
    run.root.mkdir(parents=True, exist_ok=True)
    write_atomically(run.night, night.model_dump_json(indent=2))
    return night


def situation_of(spec: RunSpec) -> Situation:
    """Return what a draft of `spec` is trained for by now.

    Raises:
        BadInput: target or tokenizer cannot be read.
    """
    section = spec.all_drafts[0]
    facts = read_target_facts(spec.target)
    return Situation(
        method=section.method,
        target_version=facts.version,
        tokenizer_version=version_in_use(load_tokenizer(spec.target), spec.data),
        layers=capture_for(section, spec.target, facts).layers,
        draft_vocab_size=section.vocab_size if isinstance(section, ReducedVocabulary) else None,
    )
