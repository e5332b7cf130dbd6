"""P-EAGLE's section of the run document."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from disagg_core.run_spec.draft import DraftSection, OwnRope, ReducedVocabulary

_SIZES = (
    "num_layers",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "sliding_window",
    "rope_theta",
)


class PEagleSection(ReducedVocabulary, OwnRope, DraftSection):
    """A P-EAGLE draft (https://arxiv.org/abs/2602.01469). Sizes that are not given are the target's."""

    title = "P-EAGLE"
    method: Literal["p_eagle"] = Field("p_eagle", description="Draft method.")
    depths: int = Field(8, ge=1, le=32, description="Depths D that are trained: tokens that the draft can propose.")
    num_layers: int = Field(4, ge=1, le=32, description="Decoder layers of the draft.")
    intermediate_size: int | None = Field(None, ge=2, description="Width of the draft's MLPs.")
    num_attention_heads: int | None = Field(None, ge=1, description="Query heads.")
    num_key_value_heads: int | None = Field(None, ge=1, description="Key and value heads.")
    sliding_window: int | None = Field(
        None, ge=2, description="Positions that a slot sees, its own included; by default all of them."
    )
    mask_token_id: int | None = Field(
        None, ge=0, description="Token of the slots beyond the first; by default the first id that no text has."
    )
    retention: float = Field(
        0.8, gt=0, le=1, description="Depth d is trained at this share, to the power d, of the positions."
    )
    least_retention: float = Field(0.2, ge=0, le=1, description="Share of the positions at every depth at least.")

    @classmethod
    def own_options(cls) -> frozenset[str]:
        """Return the options that say how a fresh draft is built."""
        return frozenset(_SIZES)

    @model_validator(mode="after")
    def _options_fit(self) -> PEagleSection:
        if self.sliding_window is not None and self.sliding_window <= self.depths:
            raise ValueError(f"sliding_window: expected more than depths ({self.depths}), found {self.sliding_window}")
        return self
