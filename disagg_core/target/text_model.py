"""What a transformers config says about its text model, whatever words it uses.

Configs of different families spell the same size in different ways, nest the text model in a wrapper, or give a value
for each layer. Everything is found by rule, not by a list of families, so that a family that nobody has tried is read
too; what cannot be found is an error that names the field.

The rules that are choices:

- A value that differs from layer to layer is the one that most layers have.
- `rope_parameters` of several kinds of layers are those of full attention, or else those with the highest base.
- A target without an MLP width of its own (a mixture of experts with experts only, or an old family) counts as
  4 times the hidden size.
- A target without attention heads counts as having heads 64 wide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from disagg_core.errors import TargetError

DEPTH = ("num_layers", "num_hidden_layers")
"""Fields with the number of decoder layers; the first counts where a layer is two that attend."""
_NORM_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "layernorm_epsilon")
_POSITIONS = ("max_position_embeddings", "max_seq_len", "n_positions", "seq_length")
_UNBOUNDED = 1 << 17
"""Longest position of a target that knows no bound, as recurrent ones do."""
_MLP_WIDTHS = ("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner")
_MLP_FACTOR = 4
_HEAD_WIDTH = 64
_STREAMS = ("altup_num_inputs", "hc_mult")
"""Fields that say how many streams of states run through the layers side by side."""
_CAPS = ("final_logit_softcapping", "logits_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
_MULTIPLIED = frozenset({"hyperclovax"})
"""Families whose ``logits_scaling`` is a factor; the others divide by it."""
_UNSCALED = frozenset({"aya_vision", "cohere2_vision"})
"""Wrappers in transformers that leave out their text model's factor."""
_SCALED_EMBEDDINGS = frozenset({"gemma4_text", "gemma4_unified_text"})
"""Families whose embedding module multiplies in SGLang 0.5.23, among those that it serves drafts of blocks for."""


def text_config(config: Any) -> Any:
    """Return the config of the text model inside `config`, or `config` itself.

    Raises:
        TargetError: it is no decoder that goes from text to text, or has several text models.
    """
    try:
        text = config.get_text_config(decoder=True)
    except ValueError as error:
        raise TargetError(f"target.model: {type(config).__name__}: {str(error).splitlines()[0]}") from error
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise TargetError(
            f"target.model: expected a decoder alone, found {config.model_type}, which has an encoder too; no draft "
            "method here reads such a model"
        )
    for name in _STREAMS:
        if (value_of(text, name) or 1) > 1:
            raise TargetError(
                f"target.model: expected layers with one stream of states, found {name}: {value_of(text, name)} in "
                f"{text.model_type}: drafts read a state of hidden_size, and no engine hands out such a target's"
            )
    return text


def value_of(text: Any, *names: str) -> Any:
    """Return the first of the fields `names` that `text` has and that is not None; None if there is none.

    Of a value for each layer, the one that most layers have.
    """
    for name in names:
        try:
            value = getattr(text, name)
        except (AttributeError, RuntimeError):  # transformers raises the latter for a value that layers differ in
            layers = getattr(text, "per_layer_config", None) or ()
            value = [getattr(layer, name, None) for layer in layers]
        if isinstance(value, (list, tuple)):
            given = [item for item in value if item is not None]
            value = Counter(given).most_common(1)[0][0] if given else None
        if value is not None:
            return value
    return None


def sizes_of(text: Any) -> dict[str, Any]:
    """Return the sizes of a text model by the names that `TargetFacts` has for them.

    Raises:
        TargetError: the config has no hidden size, number of layers or vocabulary; the field is named.
    """
    needed = {
        "hidden_size": value_of(text, "hidden_size"),
        "num_layers": value_of(text, *DEPTH),
        "vocab_size": value_of(text, "vocab_size"),
    }
    if missing := [name for name, value in needed.items() if not isinstance(value, int) or value < 1]:
        raise TargetError(
            f"target.model: expected {', '.join(missing)} in the config of {text.model_type}, found none; "
            "is it a language model?"
        )
    hidden = needed["hidden_size"]
    heads = value_of(text, "num_attention_heads") or max(1, hidden // _HEAD_WIDTH)
    return {
        **needed,
        "intermediate_size": mlp_width(text) or _MLP_FACTOR * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": value_of(text, "num_key_value_heads", "num_kv_heads") or heads,
        "head_dim": value_of(text, "head_dim") or hidden // heads,
        "max_position_embeddings": value_of(text, *_POSITIONS) or _UNBOUNDED,
        "rms_norm_eps": value_of(text, *_NORM_EPS) or 1e-5,
        "rope_parameters": flat_rope(text),
    }


def mlp_width(text: Any) -> int | None:
    """Return the width of the text model's MLP; None where it only has experts, or does not say."""
    width = value_of(text, *_MLP_WIDTHS)
    return width if isinstance(width, int) and width > 0 else None


def flat_rope(text: Any) -> dict[str, Any]:
    """Return one set of rope parameters; empty for a target without RoPE.

    Of a target whose kinds of layers have unlike ones they are full attention's. What concerns the positions of
    pictures only is left out.
    """
    given: Mapping[str, Any] = value_of(text, "rope_parameters") or {}
    kinds = {name: dict(rope) for name, rope in given.items() if isinstance(rope, Mapping)}
    if kinds:
        given = kinds.get("full_attention") or max(kinds.values(), key=lambda rope: rope.get("rope_theta") or 0)
    rope = {key: value for key, value in given.items() if value is not None and not key.startswith("mrope")}
    if not rope:
        return {}
    kind = rope.pop("type", None)
    kind = rope.get("rope_type", kind) or "default"
    theta = rope.get("rope_theta") or value_of(text, "rope_theta")
    factor = rope.get("partial_rotary_factor") or value_of(text, "partial_rotary_factor", "rotary_pct")
    return {
        **rope,
        "rope_type": "default" if kind == "mrope" else kind,
        **({"rope_theta": float(theta)} if theta else {}),
        **({"partial_rotary_factor": float(factor)} if factor and factor != 1 else {}),
    }


def token_ids(*values: Any) -> tuple[int, ...]:
    """Return the ids in `values`, each an id, several of them, or None; every id once, in order."""
    ids: list[int] = []
    for value in values:
        ids += value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return tuple(dict.fromkeys(ids))


def logit_scale(config: Any) -> float:
    """Return the factor between ``hidden @ lm_head.T`` and the logits of a model, before they are capped."""
    text, scale = config.get_text_config(), 1.0
    if config.model_type in _UNSCALED:
        return scale
    for name in _FACTORS:
        if isinstance(factor := value_of(text, name), (int, float)):
            scale *= factor
    divisor: float | None = value_of(text, *_DIVISORS)
    if divisor is not None:
        return scale * divisor if text.model_type in _MULTIPLIED else scale / divisor
    base, hidden = value_of(text, "dim_model_base"), text.hidden_size
    return scale * float(base) / float(hidden) if base else scale


def shared_embedding_scale(text: Any) -> float:
    """Return the factor on the rows of a text model's embedding in what SGLang gives a draft that has none of its own.

    SGLang hands such a draft the target's embedding module. Gemma 4's multiplies by the root of the hidden size; other
    families multiply outside of theirs, or not at all.
    """
    return float(text.hidden_size**0.5) if text.model_type in _SCALED_EMBEDDINGS else 1.0


def logit_cap(text: Any) -> float | None:
    """Return the bound c of a text model's logits, ``c * tanh(z / c)``, or None."""
    cap = value_of(text, *_CAPS)
    return float(cap) if cap else None
