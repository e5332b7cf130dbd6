"""DFlash2 behind the seam of draft methods: DFlash, with what its convolutions and its selector add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from disagg_core.contracts import Capture
from disagg_core.drafts.dflash.config import DFlashConfig
from disagg_core.drafts.dflash.method import METHOD as DFLASH
from disagg_core.drafts.dflash.method import DFlash
from disagg_core.drafts.dflash.model import DFlashDraft
from disagg_core.drafts.dflash.options import BlockShapeSection
from disagg_core.drafts.dflash2.config import DFlash2Config
from disagg_core.drafts.dflash2.drafter import SelectingDrafter
from disagg_core.drafts.dflash2.loss import DFlash2Loss
from disagg_core.drafts.dflash2.model import DFlash2Draft
from disagg_core.drafts.dflash2.options import DFlash2Section
from disagg_core.drafts.method import DraftConfig, Drafter, DraftModel, FrozenParts
from disagg_core.drafts.sampling import Sampler
from disagg_core.drafts.vocab import VocabMap
from disagg_core.errors import IncompatibleDraft
from disagg_core.run_spec.draft import DraftSection
from disagg_core.target.facts import TargetFacts


class DFlash2(DFlash):
    """DFlash2: convolutions inside the block, and a walk over each slot's candidates."""

    name = "dflash2"
    title = DFlash2Section.title
    draft_type = DFlash2Draft

    def _config(
        self, section: BlockShapeSection, facts: TargetFacts, capture: Capture, mask_token_id: int
    ) -> DFlash2Config:
        own = {key: getattr(section, key) for key in DFlash2Config.own_keys}
        return DFlash2Config.for_target(facts, section, capture, mask_token_id, is_causal=False, **own)

    def continued(
        self, config: DraftConfig, state: Mapping[str, Tensor], facts: TargetFacts, capture: Capture, vocab: VocabMap
    ) -> DFlashDraft:
        """Return a draft with the weights of a published one; a DFlash draft goes on as the DFlash2 draft that it is.

        Raises:
            IncompatibleDraft: it was made for a target of other sizes or other layers.
        """
        if isinstance(config, DFlash2Config):
            return super().continued(config, state, facts, capture, vocab)
        assert isinstance(config, DFlashConfig)
        self.check_made_for(config, facts, capture)
        return from_dflash(config, state)

    def read(
        self, document: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
    ) -> tuple[DFlashConfig, dict[str, Tensor]]:
        """Return config and tensors of a draft in either format, or of a checkpoint; a DFlash draft as what it is."""
        if DFLASH.recognises(document):
            return DFLASH.read(document, tensors, source)
        return super().read(document, tensors, source)

    def loss(
        self, draft: DraftModel, parts: FrozenParts, options: DraftSection, *, activation_checkpointing: bool
    ) -> nn.Module:
        """Return the loss module."""
        assert isinstance(draft, DFlash2Draft)
        assert isinstance(options, DFlash2Section)
        return DFlash2Loss(
            draft, parts, options.loss, options.selector, activation_checkpointing=activation_checkpointing
        )

    def drafter(
        self, draft: DraftModel, sampler: Sampler, prompts: Sequence[Sequence[int]], states: Tensor, first: Tensor
    ) -> Drafter:
        """Return a drafter of blocks that walks over candidates."""
        assert isinstance(draft, DFlash2Draft)
        return SelectingDrafter(draft, sampler, prompts, states, first)


def from_dflash(
    config: DFlashConfig, state: Mapping[str, Tensor], options: DFlash2Section | None = None
) -> DFlash2Draft:
    """Return the DFlash2 draft that computes what the DFlash draft of `config` and `state` does.

    Raises:
        IncompatibleDraft: `state` does not fit `config`, or the options' convolutions do not fit its width.
    """
    try:
        whole = DFlash2Config.from_dflash(config, options or DFlash2Section())
    except ValueError as error:
        raise IncompatibleDraft(f"draft.init_from: {error}") from error
    draft = DFlash2Draft(whole)
    own = {name: tensor for name, tensor in draft.serving_state_dict().items() if name not in state and _is_added(name)}
    draft.load_serving_state_dict({**own, **state})
    return draft


def _is_added(name: str) -> bool:
    return "_conv." in name or name.startswith("candidate_selector.")


METHOD = DFlash2()
