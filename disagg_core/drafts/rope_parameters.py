"""The RoPE of a config in its two spellings, ``rope_theta`` with ``rope_scaling`` and ``rope_parameters``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from disagg_core.errors import IncompatibleDraft

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
"""What `disagg_core.drafts.rope` computes."""


_PLAIN_BASE = 10000.0
"""Base of a draft's RoPE where the target has none."""


def draft_rope(
    target: Mapping[str, Any], own_base: float | None, kinds: Collection[str] = ROPE_TYPES
) -> dict[str, Any]:
    """Return the RoPE of a fresh draft: a plain one of `own_base`, the target's, or a plain one of the target's base.

    A draft has positions of its own, so it need not rotate as its target does. It takes the target's RoPE where that is
    one of `kinds` over the whole head. Where the target rotates a part of a head only, or in a way that engines do not
    compute for drafts (longrope), its base is kept and the rest is plain; where it has no RoPE the base is 10000.

    Args:
        target: `TargetFacts.rope_parameters`.
        own_base: ``draft.rope_theta``.
        kinds: what the draft's method can have.
    """
    kind = target.get("rope_type", "default")
    whole = target.get("partial_rotary_factor", 1.0) == 1.0
    if own_base is None and whole and kind in kinds and kind != "default":
        return dict(target)
    return {"rope_type": "default", "rope_theta": own_base or target.get("rope_theta", _PLAIN_BASE)}


def complete_rope_parameters(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return one dict with `rope_type` and `rope_theta` from either spelling, completed as Hugging Face does.

    Raises:
        IncompatibleDraft: a parameter of the type is missing, or only a part of a head is rotated.
    """
    given = {
        key: value
        for key, value in {**fields.get("rope_scaling", {}), **fields.get("rope_parameters", {})}.items()
        if value is not None
    }
    rope_type = given.pop("rope_type", None) or given.get("type", "default")
    given.pop("type", None)
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise IncompatibleDraft(
            f"draft config: partial_rotary_factor: expected 1.0, found {given['partial_rotary_factor']}"
        )
    rope = {"rope_type": rope_type, "rope_theta": fields.get("rope_theta", 10000.0), **given}
    if rope_type in ("llama3", "yarn"):
        original = fields.get("original_max_position_embeddings")
        if original is not None:
            rope["original_max_position_embeddings"] = original
        rope.setdefault("original_max_position_embeddings", fields["max_position_embeddings"])
    needed = {
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    }.get(rope_type, ())
    missing = [key for key in needed if key not in rope]
    if missing:
        raise IncompatibleDraft(f"draft config: rope_type {rope_type} needs {', '.join(missing)}")
    return rope
