"""DFlash's section of the run document."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from disagg_core.run_spec.draft import DraftSection, OwnRope
from disagg_core.run_spec.section import Section

LossType = Literal["dflash", "dpace", "dpace_prefix", "dpace_continuation"]
Normalisation = Literal["weights", "positions", "sequences"]
LayerType = Literal["full", "sliding"]

_GAMMAS = ((0, 0.0), (8, 4.0), (10, 5.0), (16, 7.0))
"""Published decays by block size; between them, and beyond the last, the line through two neighbours."""


class BlockLossSection(Section):
    """The loss over the slots of a block; formulas in the docstring of `disagg_core.drafts.dflash.loss`."""

    type: LossType = Field(
        "dflash",
        description="Weights of the slots: a fixed decay, or D-PACE, whole or one of its two factors.",
    )
    gamma: float | None = Field(
        None, gt=0, description="dflash: slot s weighs exp(-(s - 1) / gamma); by default 7 for blocks of 16, 4 for 8."
    )
    dpace_alpha: float = Field(0.5, ge=0, le=1, description="D-PACE: how far confidences are smoothed towards 1.")
    normalisation: Normalisation | None = Field(
        None,
        description="What the window's sum is divided by; by default the slots' weights, with D-PACE the positions.",
    )
    label: Literal["data", "teacher"] = Field(
        "data", description="A slot's label: the sample's token, or the target's argmax, for which its state is stored."
    )

    @model_validator(mode="after")
    def _options_take_effect(self) -> BlockLossSection:
        if self.type != "dflash" and self.gamma is not None:
            raise ValueError(f"gamma takes effect with type: dflash only, found type: {self.type}")
        if self.type != "dflash" and self.normalisation == "weights":
            raise ValueError("D-PACE's weights depend on the draft: expected normalisation positions or sequences")
        return self

    @property
    def divides_by(self) -> Normalisation:
        """What the window's sum is divided by."""
        return self.normalisation or ("weights" if self.type == "dflash" else "positions")


class BlockShapeSection(OwnRope, DraftSection):
    """What drafts of a block have in common, whatever their loss. Sizes that are not given are the target's."""

    block_size: int = Field(16, ge=2, le=64, description="Slots K of a block; the draft proposes K - 1 tokens.")
    num_layers: int = Field(5, ge=1, le=32, description="Layers of the draft, and target layers captured by default.")
    intermediate_size: int | None = Field(None, ge=2, description="Width of the draft's MLP.")
    num_attention_heads: int | None = Field(None, ge=1, description="Query heads.")
    num_key_value_heads: int | None = Field(None, ge=1, description="Key and value heads.")
    head_dim: int | None = Field(None, ge=2, description="Width of a head.")
    layer_types: LayerType | tuple[LayerType, ...] = Field(
        "full", description="full or sliding attention over the context: of all layers, or of each."
    )
    sliding_window: int | None = Field(None, ge=2, description="Tokens that a sliding layer sees, its own included.")
    mask_token_id: int | None = Field(
        None, ge=0, description="Token that stands in the slots to be predicted; by default found in the tokenizer."
    )
    embedding_scale: float | None = Field(
        None,
        gt=0,
        description="Factor on the target's embedding; by default what SGLang multiplies it by, which vLLM leaves out "
        "for DFlash: the root of the hidden size for Gemma 4, else 1.",
    )
    anchors: int = Field(512, ge=1, le=8192, description="Blocks of a sample in a step at most, drawn at random.")
    noise: float = Field(0.0, ge=0, le=1, description="Uniform noise on the captured states is within this of 0.")

    @property
    def layer_kinds(self) -> tuple[LayerType, ...]:
        """Full or sliding, for each layer."""
        return (self.layer_types,) * self.num_layers if isinstance(self.layer_types, str) else self.layer_types

    @model_validator(mode="after")
    def _layers_fit(self) -> BlockShapeSection:
        if len(self.layer_kinds) != self.num_layers:
            raise ValueError(f"layer_types: expected {self.num_layers} (num_layers), found {len(self.layer_kinds)}")
        slides = "sliding" in self.layer_kinds
        if slides and (self.sliding_window is None or self.sliding_window < self.block_size):
            raise ValueError(
                f"sliding_window: expected at least block_size ({self.block_size}) beside sliding layers, "
                f"found {self.sliding_window}"
            )
        if not slides and self.sliding_window not in (None, type(self).model_fields["sliding_window"].default):
            raise ValueError("sliding_window takes effect beside sliding layer_types only, all layers are full")
        return self

    @classmethod
    def own_options(cls) -> frozenset[str]:
        """Return the options that say how a fresh draft is built."""
        return frozenset(BlockShapeSection.model_fields) - frozenset(DraftSection.model_fields) - {"anchors", "noise"}


class BlockDraftSection(BlockShapeSection):
    """A draft with DFlash's loss."""

    loss: BlockLossSection = Field(default_factory=BlockLossSection, description="Loss options.")


class DFlashSection(BlockDraftSection):
    """A DFlash draft (https://arxiv.org/abs/2602.06036)."""

    title = "DFlash"
    method: Literal["dflash"] = Field("dflash", description="Draft method.")


def default_gamma(block_size: int) -> float:
    """Return the decay for blocks of `block_size` slots: as published for 8, 10 and 16, on a line between those."""
    below, above = next((pair for pair in pairwise(_GAMMAS) if block_size <= pair[1][0]), _GAMMAS[-2:])
    slope = (above[1] - below[1]) / (above[0] - below[0])
    return below[1] + slope * (block_size - below[0])
