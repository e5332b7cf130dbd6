"""Drafts of DFlash's family on disk: the formats, and the check that a set of tensors is a draft.

============ ======================================= ================================================================
format       for                                     what differs
============ ======================================= ================================================================
sglang       SGLang (``DFLASH``), vLLM (``dflash``)  z-lab's names and config; no embedding and no LM head
speculators  vLLM (``vllm serve <directory>``)       the draft's sizes in ``transformer_layer_config``, layer ids one
                                                     higher; holds embedding and LM head too when they are given
============ ======================================= ================================================================

Layer ids: ours and z-lab's id *k* is the output of decoder layer k. Speculators' counts the embedding as 0, so its id
is k + 1. SGLang starts with random weights in place of a tensor that is missing and says nothing, so the check is ours:
every difference between tensors and config is listed at once, by name.

``sliding_window_non_causal`` of a speculators config is about sliding layers, but vLLM makes every layer causal unless
it is true. So it is true where no layer slides, too; a draft with layers of both kinds is one that vLLM misreads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config

from disagg_core.drafts.dflash.config import DFlashConfig
from disagg_core.drafts.dflash.model import DFlashDraft, own_shapes
from disagg_core.drafts.method import ExportRequest, FrozenParts, ServingFormat
from disagg_core.errors import IncompatibleDraft

logger = logging.getLogger(__name__)

FORMATS: Mapping[str, ServingFormat] = {
    "sglang": ServingFormat("SGLang and vLLM"),
    "speculators": ServingFormat("vLLM", names_target=True, holds_parts=True),
}
_PASSED_OVER = (
    "embed_tokens.weight",
    "lm_head.weight",
    "verifier_norm.weight",
    "verifier_lm_head.weight",
    "t2d",
    "d2t",
)
"""Tensors of the target that published drafts may carry, and maps, which say nothing of a whole vocabulary."""
_SPECULATORS_VERSION = "0.9.0"
"""Version of the speculators library whose config schema is followed."""
_LIFTED = ("block_size", "mask_token_id", "sample_from_anchor")
"""Keys that a speculators config has at the top and z-lab's among the draft's own."""
_SLIDING = "sliding_attention"
_KINDS = ("conv_", "selector_", "markov_", "confidence_", "enable_confidence_")
"""How the keys begin that only one kind of draft has; they move likewise."""


def expected_shapes(draft_type: type[DFlashDraft], config: DFlashConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a draft, by serving name, without making one."""
    with torch.device("meta"):
        return own_shapes(draft_type(config))


def recognises(document: Mapping[str, Any], config_type: type[DFlashConfig], method: str) -> bool:
    """Tell whether ``config.json`` `document` is of a draft of this kind.

    A draft with another kind's keys is of that kind, whatever its architecture is called: so do engines tell them.
    """
    if "speculators_model_type" in document:
        return bool(document["speculators_model_type"] == method)
    own: Mapping[str, Any] = document.get("dflash_config") or {}
    named = set(document.get("architectures") or ()) & {"DFlashDraftModel", "DFlash2DraftModel"}
    if not (named or own) or own.get("projector_type") not in (None, "dflash") or "markov_rank" in {*document, *own}:
        return False
    if config_type.own_keys:
        return config_type.architecture in named or any(key in own for key in config_type.own_keys)
    return named <= {config_type.architecture} and not any(key in own for key in config_type.foreign_keys)


def read(
    document: Mapping[str, Any], tensors: Mapping[str, Tensor], draft_type: type[DFlashDraft], source: str
) -> tuple[DFlashConfig, dict[str, Tensor]]:
    """Return config and tensors (fp32, serving names) of a draft in either format; see `DraftMethod.read`.

    Raises:
        IncompatibleDraft: another kind of draft than this project's, or tensors that do not fit the config.
    """
    try:
        if "speculators_model_type" in document:
            document = _from_speculators(document)
        config = draft_type.config_type.from_dict(document)
    except IncompatibleDraft as error:
        raise IncompatibleDraft(f"{source}: {error}") from error
    found = {_serving_name(name): tensor for name, tensor in tensors.items() if "rotary_emb" not in name}
    for name in _PASSED_OVER:
        if found.pop(name, None) is not None:
            logger.info("%s: passed over %s, which is the target's", source, name)
    check_tensors(found, expected_shapes(draft_type, config), source)
    return config, {name: tensor.float() for name, tensor in found.items()}


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Check that `tensors` have exactly the `expected` names and shapes, floating-point dtypes and finite values.

    Raises:
        IncompatibleDraft: with every unknown, missing, misshapen, ill-typed or non-finite tensor named.
    """
    faults = [f"unknown tensor {name} {list(tensors[name].shape)}" for name in sorted(set(tensors) - set(expected))]
    faults += [f"missing tensor {name} {list(expected[name])}" for name in sorted(set(expected) - set(tensors))]
    for name in sorted(set(expected) & set(tensors)):
        tensor = tensors[name]
        if tuple(tensor.shape) != expected[name]:
            faults.append(f"{name}: expected shape {list(expected[name])}, found {list(tensor.shape)}")
        if not tensor.is_floating_point():
            faults.append(f"{name}: expected a floating-point dtype, found {tensor.dtype}")
        elif not torch.isfinite(tensor).all():
            faults.append(f"{name}: has values that are not finite")
    if faults:
        raise IncompatibleDraft(f"{source}: tensors and config do not fit: " + "; ".join(faults))


def written(
    config: DFlashConfig, tensors: Mapping[str, Tensor], method: str, request: ExportRequest, parts: FrozenParts | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return ``config.json`` and the tensors of an export in `request`'s format; see `DraftMethod.written`.

    Raises:
        IncompatibleDraft: the target's parts have other sizes, or the format cannot say what the draft computes.
    """
    document = {**config.to_dict(), "dtype": request.dtype, "torch_dtype": request.dtype}
    if request.format == "sglang":
        return document, dict(tensors)
    kept = dict(tensors)
    if parts is not None:
        expected = (config.vocab_size, config.hidden_size)
        for name, tensor in {"embed_tokens.weight": parts.embedding, "lm_head.weight": parts.lm_head}.items():
            if tuple(tensor.shape) != expected:
                raise IncompatibleDraft(f"{name}: expected shape {list(expected)}, found {list(tensor.shape)}")
            kept[name] = tensor.to(tensors["fc.weight"].dtype).clone().contiguous()
    return _speculators_config(document, config, method, request), kept


def server_flags(draft_tokens: int) -> str:
    """Return SGLang's flags for blocks with `draft_tokens` proposals; the token emitted last has a slot too."""
    return f"--speculative-algorithm DFLASH --speculative-num-draft-tokens {draft_tokens + 1}"


def _serving_name(name: str) -> str:
    name = name.removeprefix("model.")
    return name.removesuffix(".weight") if name.endswith("_codebook.weight") else name


def _from_speculators(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the z-lab config of a speculators config."""
    layer = dict(document.get("transformer_layer_config") or {})
    if layer.get("model_type") != "qwen3":
        raise IncompatibleDraft(
            f"draft config: transformer_layer_config.model_type: expected qwen3, found {layer.get('model_type')}"
        )
    layer = Qwen3Config(**layer).to_dict()  # fields that have the class's default are left out of such configs
    whole = layer.get("vocab_size")
    if document.get("draft_vocab_size", whole) != whole:
        raise IncompatibleDraft(
            f"draft config: draft_vocab_size: expected the target's whole vocabulary {whole}, "
            f"found {document['draft_vocab_size']}"
        )
    ids = document.get("aux_hidden_state_layer_ids")
    own = {key: document[key] for key in _LIFTED if key in document}
    if document.get("sliding_window_non_causal") and _SLIDING in layer["layer_types"]:
        layer["is_causal"] = False
    kind = {key: value for key, value in document.items() if key.startswith(_KINDS)}
    return {
        **layer,
        "dflash_config": {**own, **kind, "target_layer_ids": [layer_id - 1 for layer_id in ids] if ids else None},
    }


def _speculators_config(
    document: Mapping[str, Any], config: DFlashConfig, method: str, request: ExportRequest
) -> dict[str, Any]:
    """Return the config that vLLM and the speculators library read; `document` is z-lab's."""
    shaped = {
        "output_multiplier": config.output_multiplier != 1.0,
        "final_logit_softcapping": config.final_logit_softcapping is not None,
        "input_embedding_scale": config.input_embedding_scale not in (None, 1.0),
        "is_causal": config.is_causal is True,
    }
    unsaid = [name for name, given in shaped.items() if given]
    if unsaid:
        raise IncompatibleDraft(f"the speculators format cannot say {', '.join(unsaid)}; export in sglang format")
    if config.is_causal is None and len(set(config.layer_types)) > 1:
        logger.warning("vLLM runs the full layers of a draft in speculators format causally; export in sglang format")
    own = {"architectures", "dflash_config", "block_size", "num_target_layers", "is_causal", "dtype", "torch_dtype"}
    return {
        "architectures": [config.speculators_architecture],
        "speculators_model_type": method,
        "speculators_version": _SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": method,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": request.draft_tokens,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {
                "name_or_path": request.verifier_name,
                "architectures": list(request.verifier_architectures),
            },
        },
        "transformer_layer_config": {key: value for key, value in document.items() if key not in own},
        "draft_vocab_size": config.vocab_size,
        "block_size": config.block_size,
        "aux_hidden_state_layer_ids": [layer_id + 1 for layer_id in config.target_layer_ids],
        "mask_token_id": config.mask_token_id,
        "sliding_window_non_causal": config.is_causal is False or _SLIDING not in config.layer_types,
        "sample_from_anchor": False,
        **{key: getattr(config, key) for key in config.own_keys},
        "tie_word_embeddings": False,
        "dtype": request.dtype,
        "torch_dtype": request.dtype,
    }
