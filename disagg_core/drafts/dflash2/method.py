"""DFlash2 behind the seam of draft methods: DFlash, with what its convolutions and its selector add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from disagg_core.contracts import Capture
from disagg_core.drafts.dflash.config import DFlashConfig
from disagg_core.drafts.dflash.method import METHOD as DFLASH
from disagg_core.drafts.dflash.method import DFlash
from disagg_core.drafts.dflash.options import BlockShapeSection
from disagg_core.drafts.dflash2.config import DFlash2Config
from disagg_core.drafts.dflash2.drafter import SelectingDrafter
from disagg_core.drafts.dflash2.loss import DFlash2Loss
from disagg_core.drafts.dflash2.model import DFlash2Draft
from disagg_core.drafts.dflash2.options import DFlash2Section
from disagg_core.drafts.method import DraftConfig, Drafter, DraftModel, FrozenParts
from disagg_core.drafts.sampling import Sampler
from disagg_core.errors import IncompatibleDraft
from disagg_core.run_spec.draft import DraftSection
from disagg_core.target.facts import TargetFacts


class DFlash2(DFlash):
    """DFlash2: convolutions inside the block, and a walk over each slot's candidates."""

    name = "dflash2"
    title = DFlash2Section.title
    draft_type = DFlash2Draft
    continues = (DFLASH.name,)

    def _config(
        self, section: BlockShapeSection, facts: TargetFacts, capture: Capture, mask_token_id: int
    ) -> DFlash2Config:
        own = {key: getattr(section, key) for key in DFlash2Config.own_keys}
        return DFlash2Config.for_target(facts, section, capture, mask_token_id, is_causal=False, **own)

    def adopted(
        self, options: DraftSection, config: DraftConfig, state: Mapping[str, Tensor]
    ) -> tuple[DFlash2Config, dict[str, Tensor]]:
        """Return the draft; a DFlash draft with convolutions and a selector, as `options` say, that do nothing yet.

        Raises:
            IncompatibleDraft: a DFlash2 draft has other ones than the options say, or they do not fit a DFlash draft.
        """
        assert isinstance(options, DFlash2Section)
        assert isinstance(config, DFlashConfig)
        if isinstance(config, DFlash2Config):
            given = options.given(DFlash2Config.own_keys)
            if found := [name for name in given if getattr(options, name) != getattr(config, name)]:
                raise IncompatibleDraft(f"draft.init_from: the draft has its own {', '.join(found)}; leave them out")
            return config, dict(state)
        try:
            whole = DFlash2Config.from_dflash(config, options)
        except ValueError as error:
            raise IncompatibleDraft(f"draft.init_from: {error}") from error
        fresh = DFlash2Draft(whole).serving_state_dict()
        return whole, {**{name: tensor for name, tensor in fresh.items() if _is_added(name)}, **state}

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


def _is_added(name: str) -> bool:
    return "_conv." in name or name.startswith("candidate_selector.")


METHOD = DFlash2()
