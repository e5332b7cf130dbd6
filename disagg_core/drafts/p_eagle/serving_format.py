"""P-EAGLE drafts on disk: the format, which tensors a draft consists of, and the check that a set of tensors is one.

The format is the speculators library's, type ``peagle``, which vLLM loads as EAGLE-3 with parallel drafting; SGLang
serves no such draft. Layer ids in it are one higher than ours: it counts the embedding as 0. A plain config with the
fields of the layers at its top, as SpecForge's drafts have it, is read as well. A draft with the target's
whole vocabulary is written without ``d2t`` and ``t2d``. Our drafts add ``para_depths``, the depths that were trained;
where it is missing, the most tokens that the file says to propose take its place.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from disagg_core.drafts.method import ExportRequest, ServingFormat
from disagg_core.drafts.p_eagle.config import SPECULATORS_TYPE, PEagleConfig
from disagg_core.drafts.p_eagle.model import LAYERS_READ
from disagg_core.errors import IncompatibleDraft

logger = logging.getLogger(__name__)

FORMATS: Mapping[str, ServingFormat] = {"speculators": ServingFormat("vLLM", names_target=True)}
MAPS = ("d2t", "t2d")
"""Tensors of the vocabulary map, which are no weights."""
_PASSED_OVER = ("verifier_lm_head.weight", "verifier_norm.weight")
"""Tensors of the target that published drafts may carry; ours come from the target itself."""
_SPECULATORS_VERSION = "0.9.0"
"""Version of the speculators library whose config schema is followed."""


def recognises(document: Mapping[str, Any]) -> bool:
    """Tell whether ``config.json`` `document` is of a P-EAGLE draft."""
    if "speculators_model_type" in document:
        return bool(document["speculators_model_type"] == SPECULATORS_TYPE)
    return any("peagle" in str(name).lower() for name in document.get("architectures") or ())


def read(
    document: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> tuple[PEagleConfig, dict[str, Tensor]]:
    """Return config and tensors of an export or of a run's checkpoint; see `DraftMethod.read`.

    Tensors are weights in fp32, ``d2t`` int64 [K], ``t2d`` bool [V].

    Raises:
        IncompatibleDraft: another variant of P-EAGLE than this project's, or tensors that do not fit the config.
    """
    try:
        config = PEagleConfig.from_dict(document)
    except IncompatibleDraft as error:
        raise IncompatibleDraft(f"{source}: {error}") from error
    draft = dict(tensors)
    for name in _PASSED_OVER:
        if draft.pop(name, None) is not None:
            logger.info("%s: passed over %s, which is the target's", source, name)
    _complete_vocabulary(draft, config)
    check_tensors(draft, config, source)
    return config, {name: t.float() if t.is_floating_point() else t for name, t in draft.items()}


def written(
    config: PEagleConfig, tensors: Mapping[str, Tensor], request: ExportRequest
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return ``config.json`` and the tensors of an export; see `DraftMethod.written`.

    Raises:
        IncompatibleDraft: an engine is to propose more tokens than the draft has depths, or it is not said which
            layers the draft reads: vLLM would feed it from others.
    """
    if request.draft_tokens > config.depths:
        raise IncompatibleDraft(
            f"draft_tokens: expected at most {config.depths}, the depths of this draft, found {request.draft_tokens}"
        )
    if config.aux_layer_ids is None:
        raise IncompatibleDraft("the draft's config does not say which layers of the target it reads")
    document = config.to_dict()
    dtypes = {"dtype": request.dtype, "torch_dtype": request.dtype}
    proposal = {"proposal_type": "greedy", "speculative_tokens": request.draft_tokens}
    document |= {
        "transformer_layer_config": {**document["transformer_layer_config"], **dtypes},
        "speculators_version": _SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": SPECULATORS_TYPE,
            "default_proposal_method": "greedy",
            "proposal_methods": [{**proposal, "verifier_accept_k": 1, "accept_tolerance": 0.0}],
            "verifier": {
                "name_or_path": request.verifier_name,
                "architectures": list(request.verifier_architectures),
            },
        },
        **dtypes,
    }
    whole = config.draft_vocab_size == config.vocab_size
    return document, {name: tensor for name, tensor in tensors.items() if not (whole and name in MAPS)}


def expected_shapes(config: PEagleConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a draft, by serving name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config.vocab_size, hidden),
        "fc.weight": (hidden, LAYERS_READ * hidden),
        "mask_hidden": (1, 1, LAYERS_READ * hidden),
        "layers.0.hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        "lm_head.weight": (config.draft_vocab_size, hidden),
        "d2t": (config.draft_vocab_size,),
        "t2d": (config.vocab_size,),
    }
    for index in range(config.num_hidden_layers):
        place, width = f"layers.{index}.", hidden if index else 2 * hidden
        shapes |= {
            f"{place}input_layernorm.weight": (hidden,),
            f"{place}post_attention_layernorm.weight": (hidden,),
            f"{place}self_attn.q_proj.weight": (query, width),
            f"{place}self_attn.k_proj.weight": (shared, width),
            f"{place}self_attn.v_proj.weight": (shared, width),
            f"{place}self_attn.o_proj.weight": (hidden, query),
            f"{place}mlp.gate_proj.weight": (inner, hidden),
            f"{place}mlp.up_proj.weight": (inner, hidden),
            f"{place}mlp.down_proj.weight": (hidden, inner),
        }
    return shapes


def check_tensors(tensors: Mapping[str, Tensor], config: PEagleConfig, source: str) -> None:
    """Check that `tensors` are exactly a draft of this `config`: names, shapes, dtypes, finite, one vocabulary map.

    Raises:
        IncompatibleDraft: with every unknown, missing, misshapen, ill-typed or non-finite tensor named.
    """
    expected = expected_shapes(config)
    faults = [f"unknown tensor {name} {list(tensors[name].shape)}" for name in sorted(set(tensors) - set(expected))]
    faults += [f"missing tensor {name} {list(expected[name])}" for name in sorted(set(expected) - set(tensors))]
    for name in sorted(set(expected) & set(tensors)):
        faults += _faults_of(name, tensors[name], expected[name])
    if not faults:
        faults = list(_vocabulary_faults(tensors["d2t"], tensors["t2d"]))
    if faults:
        raise IncompatibleDraft(f"{source}: tensors and config do not fit: " + "; ".join(faults))


def _faults_of(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Iterable[str]:
    if tuple(tensor.shape) != shape:
        yield f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}"
    if name in MAPS:
        dtype = torch.int64 if name == "d2t" else torch.bool
        if tensor.dtype != dtype:
            yield f"{name}: expected {dtype}, found {tensor.dtype}"
    elif not tensor.is_floating_point():
        yield f"{name}: expected a floating-point dtype, found {tensor.dtype}"
    elif not torch.isfinite(tensor).all():
        yield f"{name}: has values that are not finite"


def _vocabulary_faults(d2t: Tensor, t2d: Tensor) -> Iterable[str]:
    kept = t2d.nonzero().flatten()
    if kept.numel() != d2t.numel():
        yield f"t2d: expected {d2t.numel()} target ids (the length of d2t), found {kept.numel()}"
    elif not torch.equal(torch.arange(d2t.numel(), device=d2t.device) + d2t, kept):
        yield "d2t: does not name the target ids that t2d keeps, in ascending order"


def _complete_vocabulary(draft: dict[str, Tensor], config: PEagleConfig) -> None:
    """Add what files may leave out: both maps of a whole vocabulary, and `t2d`, which follows from `d2t`."""
    if "d2t" not in draft and config.draft_vocab_size == config.vocab_size:
        draft["d2t"] = torch.zeros(config.draft_vocab_size, dtype=torch.int64)
    if "t2d" not in draft and "d2t" in draft:
        kept = torch.arange(draft["d2t"].numel()) + draft["d2t"]
        if int(kept.min()) >= 0 and int(kept.max()) < config.vocab_size:
            draft["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool)
            draft["t2d"][kept] = True
