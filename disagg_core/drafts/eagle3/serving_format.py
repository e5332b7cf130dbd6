"""EAGLE-3 drafts on disk: the formats, which tensors a draft consists of, and the check that a set of tensors is one.

========== ============================================ ====================================================
format     for                                          what differs
========== ============================================ ====================================================
sglang     SGLang (``--speculative-algorithm EAGLE3``)  serving names, no embedding: the server uses the target's
hf         publishing, and training with other tools    as sglang; holds the target's embedding too when it is given
speculators vLLM (``vllm serve <directory>``)           ``layers.0.*`` for ``midlayer.*``; layer ids one higher;
                                                        no d2t/t2d when the draft has the whole vocabulary
========== ============================================ ====================================================

Layer ids: ours and SGLang's id *k* is the output of decoder layer k. vLLM counts the embedding as 0, so its id is
k + 1; it does so for a draft in ``sglang`` format as well, which it would therefore feed from the wrong layers:
give vLLM the ``speculators`` format.

SGLang silently ignores names that it does not know and starts with random weights in their place, so the
check is ours: every difference between tensors and config is listed at once, by name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from disagg_core.drafts.eagle3.config import Eagle3Config
from disagg_core.drafts.method import ExportRequest, FrozenParts, ServingFormat
from disagg_core.errors import IncompatibleDraft

logger = logging.getLogger(__name__)

FORMATS: Mapping[str, ServingFormat] = {
    "sglang": ServingFormat("SGLang"),
    "hf": ServingFormat("publishing, and training with other tools", holds_parts=True),
    "speculators": ServingFormat("vLLM", names_target=True),
}
_THIRDS = 3
"""Target layers whose outputs a draft reads, side by side."""
_EMBEDDING = "embed_tokens.weight"
_PASSED_OVER = (_EMBEDDING, "verifier_lm_head.weight", "verifier_norm.weight")
"""Tensors of the target that published drafts may carry; ours come from the target itself."""
_SPECULATORS_VERSION = "0.9.0"
"""Version of the speculators library whose config schema is followed."""


def recognises(document: Mapping[str, Any]) -> bool:
    """Tell whether ``config.json`` `document` is of an EAGLE-3 draft.

    Some published drafts have the architecture of a plain Llama; what gives them away is a draft vocabulary.
    """
    if "speculators_model_type" in document:
        return bool(document["speculators_model_type"] == "eagle3")
    architectures = [str(name) for name in document.get("architectures") or ()]
    if any("eagle3" in name.lower() for name in architectures):
        return True
    return "draft_vocab_size" in document and set(architectures) <= {"LlamaForCausalLM"}


def read(
    document: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
) -> tuple[Eagle3Config, dict[str, Tensor]]:
    """Return config and tensors of a draft in any of the formats, or of a run's checkpoint; see `DraftMethod.read`.

    Tensors have serving names: weights in fp32, ``d2t`` int64 [K], ``t2d`` bool [V].

    Raises:
        IncompatibleDraft: another variant of EAGLE-3 than this project's, or tensors that do not fit the config.
    """
    if "speculators_model_type" in document:
        document = _from_speculators(document, source)
    config = _config_of(document, source)
    draft = {_serving_name(name): tensor for name, tensor in tensors.items()}
    for name in _PASSED_OVER:
        if name in draft and not (name == _EMBEDDING and config.owns_embedding):
            del draft[name]
            logger.info("%s: passed over %s, which is the target's", source, name)
    _complete_vocabulary(draft, config)
    check_tensors(draft, config, source)
    if "lm_head.weight" not in draft:
        logger.info("%s: has no LM head; the target's rows take its place", source)
    return config, {name: t.float() if t.is_floating_point() else t for name, t in draft.items()}


def written(
    config: Eagle3Config, tensors: Mapping[str, Tensor], request: ExportRequest, parts: FrozenParts | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return ``config.json`` and the tensors of an export in `request`'s format; see `DraftMethod.written`.

    Of the `parts` the ``hf`` format holds the embedding, in the dtype of the export, unless the draft has its own.

    Raises:
        IncompatibleDraft: the embedding is not [V, H_t].
    """
    document = {**config.to_dict(), "dtype": request.dtype, "torch_dtype": request.dtype}
    if request.format == "speculators":
        whole = config.draft_vocab_size == config.vocab_size
        return _speculators_config(document, config, request), _speculators_tensors(tensors, whole=whole)
    if config.norm_before_residual:
        raise IncompatibleDraft(
            f"format: expected speculators for a draft with norm_before_residual, found {request.format}: SGLang would "
            "take another residual without a word"
        )
    kept = dict(tensors)
    if parts is not None and not config.owns_embedding:
        expected = (config.vocab_size, config.target_hidden_size)
        if tuple(parts.embedding.shape) != expected:
            raise IncompatibleDraft(
                f"{_EMBEDDING}: expected shape {list(expected)}, found {list(parts.embedding.shape)}"
            )
        kept[_EMBEDDING] = parts.embedding.to(tensors["fc.weight"].dtype).contiguous()
    return document, kept


def server_flags(draft_tokens: int) -> str:
    """Return SGLang's flags for chains of `draft_tokens` tokens; a pass also verifies the token emitted last."""
    return (
        f"--speculative-algorithm EAGLE3 --speculative-num-steps {draft_tokens} --speculative-eagle-topk 1 "
        f"--speculative-num-draft-tokens {draft_tokens + 1}"
    )


# --- which tensors ----------------------------------------------------------------------------------------------------


def expected_shapes(config: Eagle3Config) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a draft, by serving name.

    The embedding is the target's and no part of the draft, unless the widths differ.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, _THIRDS * config.target_hidden_size),
        "midlayer.hidden_norm.weight": (hidden,),
        "midlayer.input_layernorm.weight": (hidden,),
        "midlayer.post_attention_layernorm.weight": (hidden,),
        "midlayer.self_attn.q_proj.weight": (query, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (shared, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (shared, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, query),
        "midlayer.mlp.gate_proj.weight": (inner, hidden),
        "midlayer.mlp.up_proj.weight": (inner, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, inner),
        "norm.weight": (hidden,),
        "lm_head.weight": (config.draft_vocab_size, hidden),
        "d2t": (config.draft_vocab_size,),
        "t2d": (config.vocab_size,),
    }
    if config.owns_embedding:
        shapes["embed_tokens.weight"] = (config.vocab_size, hidden)
    if config.fc_norm:
        shapes |= {f"fc_norm.{third}.weight": (config.target_hidden_size,) for third in range(_THIRDS)}
    return shapes


def check_tensors(tensors: Mapping[str, Tensor], config: Eagle3Config, source: str) -> None:
    """Check that `tensors` are exactly a draft of this `config`: names, shapes, dtypes, finite, one vocabulary map.

    The LM head may be missing where the draft has its target's width: it is the target's then.

    Raises:
        IncompatibleDraft: with every unknown, missing, misshapen, ill-typed or non-finite tensor named.
    """
    expected = expected_shapes(config)
    if "lm_head.weight" not in tensors and not config.owns_embedding:
        del expected["lm_head.weight"]
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
    if name in ("d2t", "t2d"):
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


# --- reading ----------------------------------------------------------------------------------------------------------


def _serving_name(name: str) -> str:
    name = name.removeprefix("model.")
    return "midlayer." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


def _complete_vocabulary(draft: dict[str, Tensor], config: Eagle3Config) -> None:
    """Add what formats may leave out: both maps of a whole vocabulary, and `t2d`, which follows from `d2t`."""
    if "d2t" not in draft and config.draft_vocab_size == config.vocab_size:
        draft["d2t"] = torch.zeros(config.draft_vocab_size, dtype=torch.int64)
    if "t2d" not in draft and "d2t" in draft:
        kept = torch.arange(draft["d2t"].numel()) + draft["d2t"]
        if int(kept.min()) >= 0 and int(kept.max()) < config.vocab_size:
            draft["t2d"] = torch.zeros(config.vocab_size, dtype=torch.bool)
            draft["t2d"][kept] = True


def _config_of(document: Mapping[str, Any], source: str) -> Eagle3Config:
    """Return the config; refuse drafts that compute something else than ours under the same tensor names."""
    eagle = document.get("eagle_config") or {}
    allowed: dict[str, tuple[Any, ...]] = {
        "model_type": ("llama",),
        "norm_before_fc": (False, None),
        "bias": (False, None),
        "eagle_config.norm_before_fc": (False, None),
        "eagle_config.norm_output": (False, None),
        "eagle_config.use_aux_hidden_state": (True, None),
    }
    found = {**document, **{f"eagle_config.{field}": value for field, value in eagle.items()}}
    faults = [
        f"{field}: expected {values[0]}, found {found.get(field)}"
        for field, values in allowed.items()
        if found.get(field) not in values
    ]
    if faults:
        raise IncompatibleDraft(f"{source}: not an EAGLE-3 draft of this project's kind: " + "; ".join(faults))
    try:
        return Eagle3Config.from_dict(document)
    except IncompatibleDraft as error:
        raise IncompatibleDraft(f"{source}: {error}") from error


def _from_speculators(document: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the serving-format config of a speculators config."""
    if not isinstance(document.get("norm_before_residual"), bool):
        raise IncompatibleDraft(
            f"{source}: expected norm_before_residual: true or false (whether the residual is taken after the norm), "
            f"found {document.get('norm_before_residual', 'nothing')}"
        )
    layer = dict(document.get("transformer_layer_config") or {})
    if layer.get("model_type") == "llama":  # fields that have the class's default are left out of such configs
        layer = LlamaConfig(**layer).to_dict()
    lifted = (
        "draft_vocab_size",
        "target_hidden_size",
        "fc_norm",
        "norm_before_fc",
        "norm_before_residual",
        "norm_output",
    )
    layer |= {field: document[field] for field in lifted if document.get(field) is not None}
    ids = document.get("eagle_aux_hidden_state_layer_ids")
    if ids:
        layer["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [layer_id - 1 for layer_id in ids]}
    return layer


# --- writing ----------------------------------------------------------------------------------------------------------


def _speculators_tensors(tensors: Mapping[str, Tensor], *, whole: bool) -> dict[str, Tensor]:
    renamed = {
        name.replace("midlayer.", "layers.0.", 1) if name.startswith("midlayer.") else name: tensor
        for name, tensor in tensors.items()
    }
    return {name: tensor for name, tensor in renamed.items() if not (whole and name in ("d2t", "t2d"))}


def _speculators_config(document: Mapping[str, Any], config: Eagle3Config, request: ExportRequest) -> dict[str, Any]:
    """Return the config that vLLM and the speculators library read; `document` is the serving-format one."""
    own = {"architectures", "draft_vocab_size", "target_hidden_size", "fc_norm", "eagle_config", "norm_before_residual"}
    layer = {field: value for field, value in document.items() if field not in own}
    aux_layers = config.aux_layer_ids
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": _SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
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
        "transformer_layer_config": layer,
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size if config.owns_embedding else None,
        "eagle_aux_hidden_state_layer_ids": [layer_id + 1 for layer_id in aux_layers] if aux_layers else None,
        "fc_norm": config.fc_norm,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": False,
        "norm_output": False,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "dtype": document["dtype"],
        "torch_dtype": document["torch_dtype"],
    }
