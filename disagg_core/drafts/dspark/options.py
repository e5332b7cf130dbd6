"""DSpark's section of the run document."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from disagg_core.drafts.dflash.options import BlockShapeSection
from disagg_core.run_spec.section import Section

MarkovHeadType = Literal["vanilla", "gated", "rnn"]
HEAD_OPTIONS = (
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "confidence_threshold",
)
"""Options that a draft's config has under the same name; they say how a fresh draft is built."""


class DSparkLossSection(Section):
    """The three terms of the loss; formulas in the docstring of `disagg_core.drafts.dspark.loss`."""

    ce: float = Field(0.1, ge=0, description="Weight of the cross entropy with the sample's token.")
    l1: float = Field(0.9, ge=0, description="Weight of the L1 distance to the target's distribution (twice the TV).")
    confidence: float = Field(1.0, ge=0, description="Weight of the confidence head's binary cross entropy.")
    gamma: float = Field(4.0, gt=0, description="Slot s weighs exp(-s / gamma), s from 0.")
    normalisation: Literal["weights", "positions"] = Field(
        "weights", description="What the window's sums are divided by: the slots' weights, or their number."
    )

    @model_validator(mode="after")
    def _something_is_trained(self) -> DSparkLossSection:
        if self.ce == 0 and self.l1 == 0:
            raise ValueError("expected ce or l1 above 0, found both 0, which trains no proposal")
        return self


class DSparkSection(BlockShapeSection):
    """A DSpark draft: DFlash's blocks with a bias by the token before and a confidence for each token."""

    title: ClassVar[str] = "DSpark"
    method: Literal["dspark"] = Field("dspark", description="Draft method.")
    block_size: int = Field(7, ge=2, le=64, description="Slots K of a block; the draft proposes K tokens.")
    layer_types: Literal["full"] = Field("full", description="Every layer sees the whole context.")
    markov_rank: int = Field(256, ge=1, description="Width of the Markov head's embedding of the token before.")
    markov_head_type: MarkovHeadType = Field(
        "vanilla", description="Bias by the token before alone, gated by the slot's state, or by all tokens before."
    )
    enable_confidence_head: bool = Field(True, description="Whether the draft says how likely a token is to stand.")
    confidence_head_with_markov: bool = Field(
        True, description="Whether the confidence head sees the embedding of the token before."
    )
    confidence_threshold: float = Field(
        0.0, ge=0, lt=1, description="Decoding proposes tokens up to the first less confident one; 0 proposes all."
    )
    loss: DSparkLossSection = Field(default_factory=DSparkLossSection, description="Loss options.")

    @classmethod
    def own_options(cls) -> frozenset[str]:
        """Return the options that say how a fresh draft is built."""
        return super().own_options() | frozenset(HEAD_OPTIONS)

    @model_validator(mode="after")
    def _heads_fit(self) -> DSparkSection:
        if self.enable_confidence_head and self.loss.confidence == 0:
            raise ValueError(
                "loss.confidence: expected more than 0 beside a confidence head, which would stay untrained; "
                "or set enable_confidence_head: false"
            )
        if not self.enable_confidence_head and self.confidence_threshold > 0:
            raise ValueError("confidence_threshold takes effect with enable_confidence_head only")
        return self
