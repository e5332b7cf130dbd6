"""The draft that a run begins with: fresh, or a published one (`draft.init_from`) compared with the run's target."""

from __future__ import annotations

from pathlib import Path

from disagg_core.contracts import Capture
from disagg_core.drafts.export import ImportedDraft, import_draft
from disagg_core.drafts.method import DraftConfig
from disagg_core.drafts.registry import method_of
from disagg_core.drafts.vocab import VocabMap
from disagg_core.errors import IncompatibleDraft
from disagg_core.run_spec.draft import DraftSection
from disagg_core.target.facts import TargetFacts


def first_config(
    source: Path | None, section: DraftSection, facts: TargetFacts, capture: Capture, draft_vocab_size: int
) -> DraftConfig:
    """Return the config of the draft that a run begins with: a fresh one, or the one in `source`.

    Raises:
        IncompatibleDraft: sizes do not fit the target, or the draft to continue from does not.
        BadInput: there is no mask token for it.
    """
    if source is not None:
        return read_warm_start(source, section, facts, capture).config
    return method_of(section.method).config_for(section, facts, capture, draft_vocab_size)


def vocabulary_of(imported: ImportedDraft) -> VocabMap:
    """Return the vocabulary map that a draft was trained with; the identity if it proposes all of the target's."""
    config, state = imported.config, imported.state
    if config.draft_vocab_size == config.vocab_size:
        return VocabMap.identity(config.vocab_size)
    return VocabMap.from_offsets(state["d2t"], config.vocab_size)


def read_warm_start(path: Path, section: DraftSection, facts: TargetFacts, capture: Capture) -> ImportedDraft:
    """Return the draft in `path`, to be continued in a run whose target has these `facts` and layers.

    Raises:
        IncompatibleDraft: no draft is there, or it is of a method that this one does not continue, or was made for a
            target of other sizes, vocabulary or captured layers; each difference is named.
    """
    try:
        imported = import_draft(path)
    except IncompatibleDraft as error:
        raise IncompatibleDraft(f"draft.init_from: {error}") from error
    method, config = method_of(section.method), imported.config
    known = (method.name, *method.continues)
    if imported.method.name not in known:
        raise IncompatibleDraft(
            f"draft.init_from: {path}: expected a draft of method {' or '.join(known)}, found {imported.method.name}"
        )
    pairs: dict[str, tuple[object, object]] = {
        "target width": (facts.hidden_size, config.target_hidden_size),
        "vocabulary": (facts.vocab_size, config.vocab_size),
        "captured layers": (capture.layers, config.layers or capture.layers),
    }
    faults = [f"{what}: expected {want}, found {found}" for what, (want, found) in pairs.items() if want != found]
    if faults:
        raise IncompatibleDraft(
            f"draft.init_from: {path}: made for another target than {facts.model}: {'; '.join(faults)}"
        )
    return ImportedDraft(method, *method.adopted(section, config, imported.state))
