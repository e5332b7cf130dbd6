"""The draft's config, as the speculators library writes it (type ``peagle``) and vLLM reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import LlamaConfig

from disagg_core.drafts.p_eagle.options import PEagleSection
from disagg_core.drafts.rope_parameters import ROPE_TYPES, complete_rope_parameters, draft_rope
from disagg_core.errors import IncompatibleDraft
from disagg_core.target.facts import TargetFacts

SPECULATORS_TYPE = "peagle"
_DEFAULT_DEPTHS = 8
_SLIDING = "sliding_attention"
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"

_REQUIRED: dict[str, tuple[Any, ...]] = {
    "norm_before_residual": (False, True),
    "norm_before_fc": (False, None),
    "fc_norm": (False, None),
    "norm_output": (False, None),
    "tie_word_embeddings": (False, None),
}
"""Fields that would change what is computed, and the values under which it is what is computed here."""
_REQUIRED_OF_LAYER: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
}


class PEagleConfig(BaseModel):
    """Sizes and conventions of one P-EAGLE draft; its width is the target's."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    hidden_size: int = Field(gt=0, description="Width H; the captured states are 3 * H wide.")
    intermediate_size: int = Field(gt=0, description="Width of the SwiGLU.")
    num_hidden_layers: int = Field(gt=0, description="Decoder layers n; the first one is EAGLE-3's.")
    num_attention_heads: int = Field(gt=0, description="Query heads.")
    num_key_value_heads: int = Field(gt=0, description="Key and value heads; divides the query heads.")
    head_dim: int = Field(gt=0, description="Width of a head; even.")
    vocab_size: int = Field(gt=0, description="Target vocabulary V.")
    draft_vocab_size: int = Field(gt=0, description="Draft vocabulary K.")
    max_position_embeddings: int = Field(gt=0, description="Longest position the RoPE was made for.")
    rms_norm_eps: float = Field(1e-5, gt=0, description="Epsilon of every RMSNorm.")
    rope_parameters: dict[str, Any] = Field(description="rope_type, rope_theta and that type's own parameters.")
    sliding_window: int | None = Field(None, gt=0, description="Positions that a slot sees in every layer.")
    norm_before_residual: bool = Field(
        False, description="Whether the first layer's residual is the normed state, and not the state itself."
    )
    depths: int = Field(_DEFAULT_DEPTHS, gt=0, description="Depths D that were trained.")
    mask_token_id: int = Field(ge=0, description="Token of the slots beyond the first.")
    aux_layer_ids: tuple[int, ...] | None = Field(None, description="Captured decoder layers (0-based outputs).")
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = Field(None, description="Its row of the embedding is not trained.")
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of fresh weights.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> PEagleConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, found {self.head_dim}")
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(f"draft_vocab_size {self.draft_vocab_size} is above vocab_size {self.vocab_size}")
        if self.mask_token_id >= self.vocab_size:
            raise ValueError(f"mask_token_id: expected an id below {self.vocab_size}, found {self.mask_token_id}")
        if self.rope_parameters["rope_type"] not in ROPE_TYPES:
            raise ValueError(f"rope_type: expected one of {ROPE_TYPES}, found {self.rope_parameters['rope_type']!r}")
        return self

    @property
    def target_hidden_size(self) -> int:
        """Width of the target, which is the draft's."""
        return self.hidden_size

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The target's layers that the draft reads, as the seam asks for them."""
        return self.aux_layer_ids

    def with_layers(self, layers: tuple[int, ...]) -> PEagleConfig:
        """Return the config of the same draft, said to read these `layers`."""
        return self.model_copy(update={"aux_layer_ids": layers})

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> PEagleConfig:
        """Read a config as `to_dict` or the speculators library writes it, or a plain one: the layers' fields on top.

        Layer ids of a plain config are ours, 0-based outputs.

        Raises:
            IncompatibleDraft: a size is missing or does not fit, or the draft computes something else than ours.
        """
        plain = "transformer_layer_config" not in document
        layer = dict(document if plain else document["transformer_layer_config"])
        said = {"norm_before_residual": False, "model_type": "llama", **document} if plain else document
        faults = [*_faults(said, _REQUIRED, ""), *_faults(said if plain else layer, _REQUIRED_OF_LAYER, "layers: ")]
        if not faults:
            layer = LlamaConfig(**layer).to_dict()  # fields that have the class's default are left out of files
            faults = list(_other_sizes(document, layer))
        if faults:
            raise IncompatibleDraft(f"not a P-EAGLE draft of this project's kind: {'; '.join(faults)}")
        fields = {key: value for key, value in layer.items() if value is not None}
        fields["rope_parameters"] = complete_rope_parameters(fields)
        fields["sliding_window"] = layer.get("sliding_window") if _SLIDING in (layer.get("layer_types") or ()) else None
        fields["draft_vocab_size"] = document.get("draft_vocab_size") or fields["vocab_size"]
        fields["mask_token_id"] = document.get("mask_token_id")
        fields["depths"] = (
            document.get("para_depths") or document.get("depths") or _proposed_tokens(document) or _DEFAULT_DEPTHS
        )
        fields["aux_layer_ids"] = _layers_read(document, plain=plain)
        fields["norm_before_residual"] = said["norm_before_residual"]
        return cls._validated(fields)

    def to_dict(self) -> dict[str, Any]:
        """Return ``config.json`` as plain JSON values, without what only an export knows (dtype, target, tokens)."""
        rope = dict(self.rope_parameters)
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        own = {
            "draft_vocab_size",
            "depths",
            "mask_token_id",
            "aux_layer_ids",
            "norm_before_residual",
            "rope_parameters",
            "sliding_window",
        }
        layer: dict[str, Any] = {
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            **self.model_dump(mode="json", exclude=own),
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if rope["rope_type"] == "default" else scaling,
            "rope_parameters": rope,
        }
        if self.sliding_window is not None:
            layer |= {"sliding_window": self.sliding_window, "layer_types": [_SLIDING] * self.num_hidden_layers}
        layers = self.aux_layer_ids
        return {
            "architectures": ["PEagleSpeculator"],
            "speculators_model_type": SPECULATORS_TYPE,
            "transformer_layer_config": layer,
            "draft_vocab_size": self.draft_vocab_size,
            "target_hidden_size": None,
            _LAYER_IDS: [layer_id + 1 for layer_id in layers] if layers else None,
            "mask_token_id": self.mask_token_id,
            "para_depths": self.depths,
            "norm_before_residual": self.norm_before_residual,
            "norm_before_fc": False,
            "fc_norm": False,
            "norm_output": False,
            "embed_requires_grad": True,
            "tie_word_embeddings": False,
        }

    @classmethod
    def for_target(
        cls,
        facts: TargetFacts,
        options: PEagleSection,
        layers: tuple[int, ...],
        draft_vocab_size: int,
        mask_token_id: int,
    ) -> PEagleConfig:
        """Return the config of a fresh draft for a target; sizes that `options` leave out are the target's.

        Raises:
            IncompatibleDraft: the sizes do not fit each other.
        """
        heads = options.num_attention_heads or facts.num_attention_heads
        shared = next(n for n in range(min(heads, facts.num_key_value_heads), 0, -1) if heads % n == 0)
        eos = facts.eos_token_ids
        return cls._validated(
            {
                "hidden_size": facts.hidden_size,
                "intermediate_size": options.intermediate_size or facts.intermediate_size,
                "num_hidden_layers": options.num_layers,
                "num_attention_heads": heads,
                "num_key_value_heads": options.num_key_value_heads or shared,
                "head_dim": facts.head_dim,
                "vocab_size": facts.vocab_size,
                "draft_vocab_size": draft_vocab_size,
                "max_position_embeddings": facts.max_position_embeddings,
                "rms_norm_eps": facts.rms_norm_eps,
                "rope_parameters": complete_rope_parameters(
                    {
                        "rope_parameters": draft_rope(facts.rope_parameters, options.rope_theta),
                        "max_position_embeddings": facts.max_position_embeddings,
                    }
                ),
                "sliding_window": options.sliding_window,
                "depths": options.depths,
                "mask_token_id": mask_token_id,
                "aux_layer_ids": layers,
                "bos_token_id": facts.bos_token_id,
                "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
                "pad_token_id": facts.pad_token_id,
            }
        )

    @classmethod
    def _validated(cls, fields: Mapping[str, Any]) -> PEagleConfig:
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise IncompatibleDraft(f"draft config: {problems}") from error


def _faults(found: Mapping[str, Any], required: Mapping[str, tuple[Any, ...]], place: str) -> list[str]:
    return [
        f"{place}{field}: expected {allowed[0]!r}, found {found.get(field, 'nothing')!r}"
        for field, allowed in required.items()
        if found.get(field) not in allowed
    ]


def _other_sizes(document: Mapping[str, Any], layer: Mapping[str, Any]) -> list[str]:
    """Name what only some drafts of other makers have: another width than the target's, layers of two kinds."""
    faults, width = [], document.get("target_hidden_size")
    if width not in (None, layer["hidden_size"]):
        faults.append(f"target_hidden_size: expected the draft's {layer['hidden_size']}, found {width}")
    kinds = set(layer.get("layer_types") or ())
    if len(kinds) > 1:
        faults.append(f"layer_types: expected one kind for all layers, found {', '.join(sorted(kinds))}")
    return faults


def _layers_read(document: Mapping[str, Any], *, plain: bool) -> tuple[int, ...] | None:
    """Return the captured layers by our ids; the speculators library's are one higher."""
    if plain:
        ids = document.get("aux_layer_ids") or (document.get("eagle_config") or {}).get(_LAYER_IDS)
        return tuple(ids) if ids else None
    ids = document.get(_LAYER_IDS)
    return tuple(layer_id - 1 for layer_id in ids) if ids else None


def _proposed_tokens(document: Mapping[str, Any]) -> int | None:
    """Return the most tokens that a speculators config says to propose."""
    methods = (document.get("speculators_config") or {}).get("proposal_methods") or ()
    return max((method.get("speculative_tokens") or 0 for method in methods), default=0) or None
