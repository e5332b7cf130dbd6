"""DFlash2's section of the run document."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from disagg_core.drafts.dflash.options import BlockDraftSection, LayerType
from disagg_core.run_spec.section import Section


class SelectorSection(Section):
    """The candidate selector and its loss; formulas in the docstring of `disagg_core.drafts.dflash2.loss`."""

    loss_weight: float = Field(1.0, ge=0, description="Weight of the selector's loss beside DFlash's.")
    missing: Literal["replace", "drop"] = Field(
        "replace",
        description="A label that is no candidate takes the place of the last one, or the slot teaches nothing.",
    )


class DFlash2Section(BlockDraftSection):
    """A DFlash2 draft: DFlash with convolutions inside the block and a selector of candidates."""

    title = "DFlash2"
    method: Literal["dflash2"] = Field("dflash2", description="Draft method.")
    layer_types: LayerType | tuple[LayerType, ...] = Field(
        "sliding", description="full or sliding attention over the context: of all layers, or of each."
    )
    sliding_window: int | None = Field(2048, ge=2, description="Tokens that a sliding layer sees, its own included.")
    conv_kernel_size: int = Field(2, ge=1, le=8, description="Taps of the convolutions: a slot and those before it.")
    conv_group_size: int = Field(16, ge=1, description="Channels that share a tap's correction; divides the width.")
    selector_rank: int = Field(256, ge=1, description="Width of the selector's codebooks.")
    selector_top_k: int = Field(16, ge=1, description="Candidates of a slot.")
    selector: SelectorSection = Field(default_factory=SelectorSection, description="The selector's loss.")
