"""A DFlash draft's config, in z-lab's format, which SGLang and vLLM read.

`from_dict` accepts what published drafts contain: keys that only a trainer or a library cares about are ignored, keys
that would change what is computed are refused unless they have a supported value. A draft's own keys may stand at the
top or in ``dflash_config``, where the newer files have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from disagg_core.contracts import Capture
from disagg_core.drafts.dflash.options import BlockShapeSection
from disagg_core.drafts.rope_parameters import ROPE_TYPES, complete_rope_parameters, draft_rope
from disagg_core.errors import IncompatibleDraft
from disagg_core.target.facts import TargetFacts

if TYPE_CHECKING:
    from torch import Tensor

_ROPE_TYPES = tuple(kind for kind in ROPE_TYPES if kind != "dynamic")
"""With dynamic RoPE a cached key depends on how long the text was when it was made."""
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1.0, None),
    "rope_is_neox_style": (True, None),
    "is_neox_style": (True, None),
    "projector_type": (None, "dflash"),
    "attention_sink_bias": (False, None),
    "attention_value_scale": (None, 1.0),
    "sample_from_anchor": (False, None),
    "use_swa": (False, None),
    "markov_rank": (None,),
}
_OWN = ("block_size", "mask_token_id", "target_layer_ids", "num_target_layers")
_OPTIONAL = ("output_multiplier", "final_logit_softcapping", "input_embedding_scale")


class LayerMask(NamedTuple):
    """What a layer's slots see.

    A slot at position q sees the context at positions c with ``q - c < window``, and of its own block the slots up to
    itself if `causal`, else all of them. With `by_anchor` the window is the block's: ``anchor - c <= window`` for every
    slot, as the speculators library trains; engines window by slot.
    """

    window: int | None
    causal: bool
    by_anchor: bool = False

    def first_seen(self, slots: Tensor) -> Tensor:
        """Return for each of `slots` (in a block, 0 to K - 1) the first position that it sees, less the anchor's."""
        assert self.window is not None
        return slots * 0 - self.window if self.by_anchor else slots - (self.window - 1)


class DFlashConfig(BaseModel):
    """Sizes and conventions of one DFlash draft; the names are those of ``config.json``."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    architecture: ClassVar[str] = "DFlashDraftModel"
    speculators_architecture: ClassVar[str] = "DFlashSpeculator"
    own_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of ``dflash_config`` that only this kind of draft has, all of them."""
    foreign_keys: ClassVar[tuple[str, ...]] = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
    """Keys of ``dflash_config`` that make it another kind of draft."""
    required_values: ClassVar[Mapping[str, tuple[Any, ...]]] = _REQUIRED_VALUES
    """Keys that would change what is computed, with the values that do not."""

    hidden_size: int = Field(gt=0, description="Width H of draft and target.")
    intermediate_size: int = Field(gt=0, description="Width of the SwiGLU.")
    num_hidden_layers: int = Field(gt=0, description="Layers of the draft.")
    num_attention_heads: int = Field(gt=0, description="Query heads.")
    num_key_value_heads: int = Field(gt=0, description="Key and value heads; divides the query heads.")
    head_dim: int = Field(gt=0, description="Width of a head; even.")
    vocab_size: int = Field(gt=0, description="The target's vocabulary V.")
    max_position_embeddings: int = Field(gt=0, description="Longest position the RoPE was made for.")
    rms_norm_eps: float = Field(1e-6, gt=0, description="Epsilon of every RMSNorm.")
    rope_parameters: dict[str, Any] = Field(description="rope_type, rope_theta and that type's own parameters.")
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...]
    sliding_window: int | None = Field(None, gt=0, description="Window W of the sliding layers.")
    is_causal: bool | None = Field(
        None, description="Whether slots see earlier slots only; None: in sliding layers they do, in full ones not."
    )
    block_size: int = Field(ge=2, description="Slots K of a block.")
    mask_token_id: int = Field(ge=0, description="Token in the slots to be predicted.")
    target_layer_ids: tuple[int, ...] = Field(min_length=1, description="Captured decoder layers (0-based outputs).")
    num_target_layers: int | None = Field(None, gt=0, description="Decoder layers of the target.")
    output_multiplier: float = Field(1.0, gt=0, description="Factor on the logits.")
    final_logit_softcapping: float | None = Field(None, gt=0, description="Logits z become cap * tanh(z / cap).")
    input_embedding_scale: float | None = Field(
        None, gt=0, description="Factor on the embedding; None where it is what the engine multiplies by."
    )
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of fresh weights.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        faults = []
        if self.num_attention_heads % self.num_key_value_heads:
            faults.append(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            faults.append(f"head_dim: expected an even number, found {self.head_dim}")
        if self.mask_token_id >= self.vocab_size:
            faults.append(f"mask_token_id {self.mask_token_id} is outside the vocabulary of {self.vocab_size}")
        if self.rope_parameters["rope_type"] not in _ROPE_TYPES:
            faults.append(f"rope_type: expected one of {_ROPE_TYPES}, found {self.rope_parameters['rope_type']!r}")
        if len(self.layer_types) != self.num_hidden_layers:
            faults.append(f"layer_types: expected {self.num_hidden_layers}, found {len(self.layer_types)}")
        if "sliding_attention" in self.layer_types and (self.sliding_window or 0) < self.block_size:
            faults.append(
                f"sliding_window: expected at least block_size {self.block_size}, found {self.sliding_window}"
            )
        ids = self.target_layer_ids
        last = self.num_target_layers - 2 if self.num_target_layers else max(ids)
        if list(ids) != sorted(set(ids)) or min(ids) < 0 or max(ids) > last:
            faults.append(f"target_layer_ids: expected ascending ids from 0 to {last}, found {list(ids)}")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def draft_vocab_size(self) -> int:
        """Tokens that the draft can propose: all."""
        return self.vocab_size

    @property
    def target_hidden_size(self) -> int:
        """Width of the target: the draft's."""
        return self.hidden_size

    @property
    def layers(self) -> tuple[int, ...]:
        """The target's layers that the draft reads."""
        return self.target_layer_ids

    @property
    def layer_masks(self) -> tuple[LayerMask, ...]:
        """What the slots of each layer see."""
        sliding = [kind == "sliding_attention" for kind in self.layer_types]
        return tuple(
            LayerMask(self.sliding_window if slides else None, slides if self.is_causal is None else self.is_causal)
            for slides in sliding
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a config in z-lab's format.

        Raises:
            IncompatibleDraft: a size is missing or does not fit, or the config asks for something unsupported.
        """
        nested = dict(values.get("dflash_config") or {})
        found = {**values, **{key: value for key, value in nested.items() if value is not None}}
        faults = [
            f"{key}: expected {allowed[0]!r}, found {found[key]!r}"
            for key, allowed in cls.required_values.items()
            if key in found and found[key] not in allowed
        ]
        faults += [f"{key}: unknown to a {cls.architecture}" for key in cls.foreign_keys if found.get(key) is not None]
        needed = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", *_OWN[:3], *cls.own_keys)
        faults += [f"no {key}" for key in needed if found.get(key) is None]
        if faults:
            raise IncompatibleDraft(f"draft config: {'; '.join(faults)}")
        fields = _completed({key: value for key, value in found.items() if value is not None})
        causal = values.get("is_causal")
        fields["is_causal"] = nested.get("causal") if causal is None else causal
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise IncompatibleDraft(f"draft config: {problems}") from error

    def with_layers(self, layers: tuple[int, ...]) -> Self:
        """Return the config of the same draft, said to read these `layers`."""
        return self.model_copy(update={"target_layer_ids": tuple(layers)})

    def to_dict(self) -> dict[str, Any]:
        """Return z-lab's ``config.json`` as a dict of plain JSON values (without a dtype)."""
        own = (*_OWN, *_OPTIONAL, *self.own_keys)
        values = self.model_dump(mode="json")
        inner = {key: values.pop(key) for key in own}
        optional = {key: inner[key] for key in _OPTIONAL if inner[key] is not None}
        if self.output_multiplier == 1.0:
            del optional["output_multiplier"]
        rope = values["rope_parameters"]
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        sliding = "sliding_attention" in self.layer_types
        document = {
            "architectures": [self.architecture],
            "model_type": "qwen3",
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            **values,
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if rope["rope_type"] == "default" else scaling,
            "use_sliding_window": sliding,
            "max_window_layers": self.num_hidden_layers,
            "block_size": self.block_size,
            "num_target_layers": self.num_target_layers,
            "dflash_config": {
                "mask_token_id": self.mask_token_id,
                "target_layer_ids": list(self.target_layer_ids),
                "block_size": self.block_size,
                **{key: inner[key] for key in self.own_keys},
                **optional,
            },
        }
        if self.is_causal is None:
            del document["is_causal"]
        return document

    @classmethod
    def for_target(
        cls, facts: TargetFacts, options: BlockShapeSection, capture: Capture, mask_token_id: int, **extra: Any
    ) -> Self:
        """Return the config of a fresh draft for a target; sizes that `options` leave out are the target's.

        Args:
            facts: of the target.
            options: of the draft.
            capture: the target's layers.
            mask_token_id: as `disagg_core.drafts.mask_token.mask_token_of` returns it.
            extra: fields that only this kind of draft has.

        Raises:
            IncompatibleDraft: the sizes do not fit each other.
        """
        heads = options.num_attention_heads or facts.num_attention_heads
        return cls.from_dict(
            {
                "hidden_size": facts.hidden_size,
                "intermediate_size": options.intermediate_size or facts.intermediate_size,
                "num_hidden_layers": options.num_layers,
                "num_attention_heads": heads,
                "num_key_value_heads": options.num_key_value_heads or min(heads, facts.num_key_value_heads),
                "head_dim": options.head_dim or facts.head_dim,
                "vocab_size": facts.vocab_size,
                "max_position_embeddings": facts.max_position_embeddings,
                "rms_norm_eps": facts.rms_norm_eps,
                "rope_parameters": draft_rope(facts.rope_parameters, options.rope_theta, _ROPE_TYPES),
                "layer_types": [f"{kind}_attention" for kind in options.layer_kinds],
                "sliding_window": options.sliding_window if "sliding" in options.layer_kinds else None,
                "block_size": options.block_size,
                "mask_token_id": mask_token_id,
                "target_layer_ids": list(capture.layers),
                "num_target_layers": facts.num_layers,
                "output_multiplier": facts.logit_scale if "output_multiplier" not in cls.required_values else None,
                "input_embedding_scale": options.embedding_scale,
                "bos_token_id": facts.bos_token_id,
                "eos_token_id": facts.eos_token_ids[0]
                if len(facts.eos_token_ids) == 1
                else facts.eos_token_ids or None,
                "pad_token_id": facts.pad_token_id,
                **extra,
            }
        ).with_scale_of(facts)

    def with_scale_of(self, facts: TargetFacts) -> Self:
        """Return a config that says the factor on this target's embedding, where it says none and there is one."""
        if self.input_embedding_scale is not None or facts.embedding_scale == 1.0:
            return self
        return self.model_copy(update={"input_embedding_scale": facts.embedding_scale})


def _completed(fields: dict[str, Any]) -> dict[str, Any]:
    """Return `fields` with what a file may leave out, as transformers' Qwen3 completes it."""
    fields.setdefault("num_key_value_heads", fields["num_attention_heads"])
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    fields.setdefault("max_position_embeddings", 32768)
    window, full_below = fields.get("sliding_window"), fields.get("max_window_layers", fields["num_hidden_layers"])
    slides = window is not None and fields.get("use_sliding_window", False)
    fields.setdefault(
        "layer_types",
        [
            "sliding_attention" if slides and layer >= full_below else "full_attention"
            for layer in range(fields["num_hidden_layers"])
        ],
    )
    fields["rope_parameters"] = complete_rope_parameters(fields)
    return fields
