"""EAGLE-3's section of the run document."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from disagg_core.run_spec.draft import DraftSection, OwnRope, ReducedVocabulary
from disagg_core.run_spec.section import Section

_OWN = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "fc_norm",
    "rope_theta",
    "head_init",
)


class LossSection(Section):
    """The training-time-test loss; formulas in the docstring of `disagg_core.drafts.eagle3.loss`."""

    type: Literal["soft_cross_entropy", "lk_alpha", "lk_lambda"] = Field(
        "soft_cross_entropy", description="Soft cross entropy, or one of the LK (acceptance) losses."
    )
    step_decay: float = Field(0.8, gt=0, le=1, description="Weight of test step k is step_decay to the power k.")
    mask_mode: Literal["aligned", "compat"] = Field("aligned", description="aligned: the mask follows the token.")
    normalisation: Literal["valid", "compat"] = Field("valid", description="valid: divide by unmasked positions.")
    kl_scale: float = Field(1.0, ge=0, description="LK lambda: weight of the divergence at zero acceptance.")
    kl_decay: float = Field(1.0, ge=0, description="LK lambda: how fast that weight falls with acceptance.")


class Eagle3Section(ReducedVocabulary, OwnRope, DraftSection):
    """An EAGLE-3 draft. Sizes that are not given are the target's."""

    title = "EAGLE-3"
    method: Literal["eagle3"] = Field("eagle3", description="Draft method.")
    hidden_size: int | None = Field(None, ge=2, description="Width of the draft's layer.")
    intermediate_size: int | None = Field(None, ge=2, description="Width of the draft's MLP.")
    num_attention_heads: int | None = Field(None, ge=1, description="Query heads.")
    num_key_value_heads: int | None = Field(None, ge=1, description="Key and value heads.")
    ttt_length: int = Field(7, ge=1, le=16, description="Training-time-test length L.")
    fc_norm: bool = Field(False, description="RMSNorm of each aux third before fc (EAGLE-3.1).")
    head_init: Literal["random", "target"] = Field(
        "random", description="target: the LM head starts with the target's rows, which learns faster in short runs."
    )
    loss: LossSection = Field(default_factory=LossSection, description="Loss options.")

    @classmethod
    def own_options(cls) -> frozenset[str]:
        """Return the options that say how a fresh draft is built."""
        return frozenset(_OWN)

    @model_validator(mode="after")
    def _head_has_the_targets_width(self) -> Eagle3Section:
        if self.head_init == "target" and self.hidden_size is not None:
            raise ValueError("head_init: expected random for a draft with a hidden_size of its own, found target")
        return self
