"""The draft's config, in the format that serving engines read.

`from_dict` accepts what published drafts contain: keys that only a trainer or a library cares about are ignored, keys
that would change what is computed are refused unless they have the one supported value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from disagg_core.drafts.eagle3.options import Eagle3Section
from disagg_core.drafts.eagle_layers import default_layers
from disagg_core.drafts.rope_parameters import ROPE_TYPES, complete_rope_parameters, draft_rope
from disagg_core.errors import IncompatibleDraft
from disagg_core.target.facts import TargetFacts

ARCHITECTURE = "LlamaForCausalLMEagle3"

_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "num_hidden_layers": (1,),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "norm_output": (False, None),
    "tie_word_embeddings": (False, None),
    "partial_rotary_factor": (1.0, None),
}


class Eagle3Config(BaseModel):
    """Sizes and conventions of one EAGLE-3 draft; the names are those of the serving format's ``config.json``."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    hidden_size: int = Field(gt=0, description="Draft width H.")
    target_hidden_size: int = Field(gt=0, description="Target width H_t; the captured aux state is 3 * H_t wide.")
    intermediate_size: int = Field(gt=0, description="Width of the SwiGLU.")
    num_attention_heads: int = Field(gt=0, description="Query heads.")
    num_key_value_heads: int = Field(gt=0, description="Key and value heads; divides the query heads.")
    head_dim: int = Field(gt=0, description="Width of a head; even.")
    vocab_size: int = Field(gt=0, description="Target vocabulary V.")
    draft_vocab_size: int = Field(gt=0, description="Draft vocabulary K.")
    max_position_embeddings: int = Field(gt=0, description="Longest position the RoPE was made for.")
    rms_norm_eps: float = Field(1e-5, gt=0, description="Epsilon of every RMSNorm.")
    rope_parameters: dict[str, Any] = Field(description="rope_type, rope_theta and that type's own parameters.")
    fc_norm: bool = Field(False, description="RMSNorm of each aux third before fc (EAGLE-3.1).")
    norm_before_residual: bool = Field(
        False,
        description="The residual is the normed state; the speculators library trains such drafts, vLLM serves them.",
    )
    aux_layer_ids: tuple[int, ...] | None = Field(None, description="Captured decoder layers (0-based outputs).")
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of fresh weights.")

    @model_validator(mode="after")
    def _sizes_fit(self) -> Eagle3Config:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, found {self.head_dim}")
        if self.draft_vocab_size > self.vocab_size:
            raise ValueError(f"draft_vocab_size {self.draft_vocab_size} is above vocab_size {self.vocab_size}")
        if self.rope_parameters["rope_type"] not in ROPE_TYPES:
            raise ValueError(f"rope_type: expected one of {ROPE_TYPES}, found {self.rope_parameters['rope_type']!r}")
        return self

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The target's layers that the draft reads, as the seam asks for them."""
        return self.aux_layer_ids

    @property
    def owns_embedding(self) -> bool:
        """Whether the draft has an embedding of its own, because the target's has another width."""
        return self.target_hidden_size != self.hidden_size

    def with_layers(self, layers: tuple[int, ...]) -> Eagle3Config:
        """Return the config of the same draft, said to read these `layers`."""
        return self.model_copy(update={"aux_layer_ids": layers})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Eagle3Config:
        """Read a config in serving format (``rope_theta`` with ``rope_scaling``, or ``rope_parameters``).

        Raises:
            IncompatibleDraft: a size is missing or does not fit, or the config asks for something unsupported.
        """
        for key, allowed in _REQUIRED_VALUES.items():
            if key in values and values[key] not in allowed:
                raise IncompatibleDraft(f"draft config: {key}: expected {allowed[0]!r}, found {values[key]!r}")
        fields = {key: value for key, value in values.items() if value is not None}
        eagle: Mapping[str, Any] = fields.get("eagle_config", {})
        missing = [key for key in ("hidden_size", "num_attention_heads", "vocab_size") if key not in fields]
        if missing:
            raise IncompatibleDraft(f"draft config: no {', '.join(missing)}; give a config in serving format")
        heads = fields["num_attention_heads"]
        fields.setdefault("target_hidden_size", fields["hidden_size"])
        fields.setdefault("num_key_value_heads", heads)
        fields.setdefault("head_dim", fields["hidden_size"] // heads)
        fields.setdefault("draft_vocab_size", fields["vocab_size"])
        fields.setdefault("max_position_embeddings", 2048)
        fields["rope_parameters"] = complete_rope_parameters(fields)
        fields["fc_norm"] = bool(fields.get("fc_norm", eagle.get("fc_norm", False)))
        layer_ids = fields.get("aux_layer_ids", eagle.get("eagle_aux_hidden_state_layer_ids"))
        fields["aux_layer_ids"] = tuple(layer_ids) if layer_ids else None
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise IncompatibleDraft(f"draft config: {problems}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the serving format's ``config.json`` as a dict of plain JSON values (without a dtype)."""
        rope = dict(self.rope_parameters)
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        values: dict[str, Any] = {
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "hidden_act": "silu",
            "num_hidden_layers": 1,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            **self.model_dump(
                mode="json", exclude={"rope_parameters", "aux_layer_ids", "fc_norm", "norm_before_residual"}
            ),
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if rope["rope_type"] == "default" else scaling,
            "rope_parameters": rope,
        }
        eagle: dict[str, Any] = {}
        if self.aux_layer_ids is not None:
            eagle = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": list(self.aux_layer_ids)}
        if self.fc_norm:
            values["fc_norm"] = eagle["fc_norm"] = True
        if eagle:
            values["eagle_config"] = eagle
        if self.norm_before_residual:
            values["norm_before_residual"] = True
        return values

    @classmethod
    def for_target(
        cls, facts: TargetFacts, draft: Eagle3Section, layers: tuple[int, ...] | None = None
    ) -> Eagle3Config:
        """Return the config of a fresh draft for a target; sizes that `draft` leaves out are the target's.

        With another `hidden_size` the head width stays the target's and the MLP keeps its proportion. `layers` are the
        captured ones; by default chosen from the target's depth.

        Raises:
            IncompatibleDraft: the sizes do not fit each other.
        """
        hidden = draft.hidden_size or facts.hidden_size
        same_width = hidden == facts.hidden_size
        heads = draft.num_attention_heads or (
            facts.num_attention_heads if same_width else max(1, hidden // facts.head_dim)
        )
        kv_heads = draft.num_key_value_heads or _largest_divisor(heads, facts.num_key_value_heads)
        proportional = max(1, round(facts.intermediate_size * hidden / facts.hidden_size))
        return cls.from_dict(
            {
                "hidden_size": hidden,
                "target_hidden_size": facts.hidden_size,
                "intermediate_size": draft.intermediate_size or proportional,
                "num_attention_heads": heads,
                "num_key_value_heads": kv_heads,
                "head_dim": facts.head_dim,
                "vocab_size": facts.vocab_size,
                "draft_vocab_size": draft.vocab_size or facts.vocab_size,
                "max_position_embeddings": facts.max_position_embeddings,
                "rms_norm_eps": facts.rms_norm_eps,
                "rope_parameters": draft_rope(facts.rope_parameters, draft.rope_theta),
                "fc_norm": draft.fc_norm,
                "aux_layer_ids": layers or default_layers(facts.num_layers),
                "bos_token_id": facts.bos_token_id,
                "eos_token_id": facts.eos_token_ids[0]
                if len(facts.eos_token_ids) == 1
                else facts.eos_token_ids or None,
                "pad_token_id": facts.pad_token_id,
            }
        )


def _largest_divisor(number: int, at_most: int) -> int:
    return next(value for value in range(min(number, at_most), 0, -1) if number % value == 0)
