"""DSpark drafts on disk: DFlash's formats with the two heads.

============ ======================================= ================================================================
format       for                                     what differs
============ ======================================= ================================================================
sglang       SGLang (``DSPARK``), vLLM (``dspark``)  DeepSpec's names and config; no embedding and no LM head
speculators  vLLM (``vllm serve <directory>``)       as DFlash's, with the heads' keys at the top and
                                                     ``sample_from_anchor: true``: slot 0 proposes too
============ ======================================= ================================================================

Older drafts of the speculators library have ``sample_from_anchor: false``, labels that are not shifted: they compute
something else and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from disagg_core.drafts.dflash import serving_format as blocks
from disagg_core.drafts.dspark.config import ARCHITECTURES, DSparkConfig
from disagg_core.drafts.dspark.options import HEAD_OPTIONS
from disagg_core.drafts.method import ExportRequest, FrozenParts

FORMATS = blocks.FORMATS
_LAYER_HAS_NOT = (*HEAD_OPTIONS, "mask_token_id", "target_layer_ids", "num_anchors")
"""Keys of DeepSpec's config that are none of a speculators config's layers."""


def recognises(document: Mapping[str, Any]) -> bool:
    """Tell whether ``config.json`` `document` is of a DSpark draft."""
    if "speculators_model_type" in document:
        return bool(document["speculators_model_type"] == "dspark")
    return bool(set(document.get("architectures") or ()) & set(ARCHITECTURES))


def written(
    config: DSparkConfig, tensors: Mapping[str, Tensor], request: ExportRequest, parts: FrozenParts | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return ``config.json`` and the tensors of an export in `request`'s format; see `DraftMethod.written`.

    Raises:
        IncompatibleDraft: the target's parts have other sizes, or the format cannot say what the draft computes.
    """
    document, kept = blocks.written(config, tensors, "dspark", request, parts)
    if request.format == "speculators":
        layer = document["transformer_layer_config"]
        heads = {key: layer[key] for key in HEAD_OPTIONS if key in layer}
        document["transformer_layer_config"] = {k: v for k, v in layer.items() if k not in _LAYER_HAS_NOT}
        document |= {**heads, "sample_from_anchor": True}
    return document, kept


def server_flags(draft_tokens: int) -> str:
    """Return SGLang's flags for `draft_tokens` proposals a pass, which also verifies the token emitted last."""
    return f"--speculative-algorithm DSPARK --speculative-num-draft-tokens {draft_tokens + 1}"
