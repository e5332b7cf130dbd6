"""A DSpark draft's config, in DeepSpec's format, which SGLang and vLLM read.

`from_dict` also accepts the draft's own keys where others write them: in ``dflash_config`` or ``dspark_config``, or at
the top with the prefix ``dspark_``. A draft without `markov_head_type` has the vanilla head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from disagg_core.drafts.dflash.config import DFlashConfig
from disagg_core.drafts.dspark.options import MarkovHeadType

ARCHITECTURES = ("Qwen3DSparkModel", "DSparkDraftModel")
"""Names that published files have; the first is DeepSpec's and ours."""
_PREFIX = "dspark_"


class DSparkConfig(DFlashConfig):
    """Sizes and conventions of one DSpark draft; the names are those of ``config.json``."""

    architecture: ClassVar[str] = ARCHITECTURES[0]
    speculators_architecture: ClassVar[str] = "DSparkSpeculator"
    own_keys: ClassVar[tuple[str, ...]] = ("markov_rank",)
    required_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **{key: values for key, values in DFlashConfig.required_values.items() if key != "markov_rank"},
        "projector_type": ("dspark", None),
        "sample_from_anchor": (True, None),
        "attention_mode": ("gqa", "mha", None),
        "is_causal": (False, None),
        "causal": (False, None),
        "output_multiplier": (1.0, None),
        "final_logit_softcapping": (None,),
    }

    markov_rank: int = Field(gt=0, description="Width r of the Markov head.")
    markov_head_type: MarkovHeadType = Field("vanilla", description="What the Markov head's bias depends on.")
    enable_confidence_head: bool = Field(True, description="Whether there is a confidence head.")
    confidence_head_with_markov: bool = Field(True, description="Whether it sees the Markov head's embedding.")
    confidence_threshold: float = Field(0.0, ge=0, lt=1, description="Proposals end before a less confident token.")
    num_anchors: int | None = Field(None, gt=0, description="Blocks of a sample that the draft was trained with.")

    @model_validator(mode="after")
    def _layers_are_full(self) -> Self:
        sliding = [index for index, kind in enumerate(self.layer_types) if kind != "full_attention"]
        if sliding:
            raise ValueError(f"layer_types: expected full_attention in every layer, found others in layers {sliding}")
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a config in DeepSpec's format, or with the draft's keys in a section of their own.

        Raises:
            IncompatibleDraft: a size is missing or does not fit, or the config asks for something unsupported.
        """
        prefixed = {key.removeprefix(_PREFIX): value for key, value in values.items() if key.startswith(_PREFIX)}
        nested = prefixed.pop("config", None) or {}
        flat = {**values, **(values.get("dflash_config") or {}), **prefixed, **nested, "dflash_config": None}
        return super().from_dict({key: value for key, value in flat.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return DeepSpec's ``config.json`` as a dict of plain JSON values (without a dtype)."""
        document = super().to_dict()
        document |= document.pop("dflash_config")
        unsaid = [key for key in ("confidence_threshold", "num_anchors") if not document[key]]
        return {key: value for key, value in document.items() if key not in unsaid}
