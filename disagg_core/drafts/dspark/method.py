"""DSpark behind the seam of draft methods: DFlash, with what its heads and its shifted labels change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from disagg_core.contracts import Capture
from disagg_core.drafts.dflash.method import DFlash
from disagg_core.drafts.dflash.options import BlockShapeSection
from disagg_core.drafts.dspark import serving_format
from disagg_core.drafts.dspark.batch import DSparkBatcher
from disagg_core.drafts.dspark.config import DSparkConfig
from disagg_core.drafts.dspark.drafter import WalkingDrafter
from disagg_core.drafts.dspark.loss import DSparkLoss
from disagg_core.drafts.dspark.model import DSparkDraft
from disagg_core.drafts.dspark.options import HEAD_OPTIONS, DSparkSection
from disagg_core.drafts.figures import Figures, Ratio
from disagg_core.drafts.method import DraftConfig, Drafter, DraftModel, ExportRequest, FrozenParts
from disagg_core.drafts.sampling import Sampler
from disagg_core.drafts.simulated import simulated_accept_length
from disagg_core.run_spec.draft import DraftSection
from disagg_core.target.facts import TargetFacts

_BY_SLOT = ("accuracies", "acceptance_rates")


class DSpark(DFlash):
    """DSpark (https://arxiv.org/abs/2607.05147): blocks whose tokens know the one before, and how sure they are."""

    name = "dspark"
    title = DSparkSection.title
    formats = serving_format.FORMATS
    draft_type = DSparkDraft
    slots_without_proposal = 0

    def needs_last_state(self, section: BlockShapeSection) -> bool:
        """It always does: the target's distribution is taught."""
        return True

    def _config(
        self, section: BlockShapeSection, facts: TargetFacts, capture: Capture, mask_token_id: int
    ) -> DSparkConfig:
        own = {key: getattr(section, key) for key in HEAD_OPTIONS}
        return DSparkConfig.for_target(facts, section, capture, mask_token_id, num_anchors=section.anchors, **own)

    def batcher(self, options: DraftSection, config: DraftConfig, *, seed: int) -> DSparkBatcher:
        """Return what makes the batches and draws their blocks."""
        assert isinstance(options, DSparkSection)
        assert isinstance(config, DSparkConfig)
        return DSparkBatcher(options, config, seed=seed)

    def loss(
        self, draft: DraftModel, parts: FrozenParts, options: DraftSection, *, activation_checkpointing: bool
    ) -> nn.Module:
        """Return the loss module."""
        assert isinstance(draft, DSparkDraft)
        assert isinstance(options, DSparkSection)
        return DSparkLoss(draft, parts, options.loss, activation_checkpointing=activation_checkpointing)

    def figures(self, ratios: Mapping[str, Ratio]) -> Figures:
        """Return each ratio, and the accept length that the accuracies make likely."""
        values = {name: ratio.value() for name, ratio in ratios.items()}
        figures: Figures = {name: value if name in _BY_SLOT else value[0] for name, value in values.items()}
        return {**figures, "simulated_accept_length": simulated_accept_length(values["accuracies"])}

    def drafter(
        self, draft: DraftModel, sampler: Sampler, prompts: Sequence[Sequence[int]], states: Tensor, first: Tensor
    ) -> Drafter:
        """Return a drafter of blocks that walks over their slots."""
        assert isinstance(draft, DSparkDraft)
        return WalkingDrafter(draft, sampler, prompts, states, first)

    def recognises(self, document: Mapping[str, Any]) -> bool:
        """Tell a config by its architecture or its speculators type."""
        return serving_format.recognises(document)

    def written(
        self, config: DraftConfig, tensors: Mapping[str, Tensor], request: ExportRequest, parts: FrozenParts | None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return config document and tensors in `request`'s format."""
        assert isinstance(config, DSparkConfig)
        return serving_format.written(config, tensors, request, parts)

    def server_flags(self, draft_tokens: int) -> str:
        """Return the flags that SGLang needs to draft blocks."""
        return serving_format.server_flags(draft_tokens)


METHOD = DSpark()
