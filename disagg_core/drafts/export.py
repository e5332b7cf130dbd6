"""Drafts on disk in the formats that others load: written, checked, read back, and read in again.

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

``config.json`` is written last: a directory with one is whole.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig

from disagg_core.drafts.eagle3.config import Eagle3Config
from disagg_core.drafts.eagle3.serving_format import check_tensors
from disagg_core.drafts.tensor_files import CHECKPOINT_WEIGHTS, save_tensors
from disagg_core.errors import IncompatibleDraft
from disagg_core.files import write_atomically
from disagg_core.run_spec.document import TargetSection
from disagg_core.target.facts import load_target_config

logger = logging.getLogger(__name__)

ExportFormat = Literal["sglang", "hf", "speculators"]
"""What `export_draft` writes and `import_draft` reads."""
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_EMBEDDING = "embed_tokens.weight"
_PASSED_OVER = (_EMBEDDING, "verifier_lm_head.weight", "verifier_norm.weight")
"""Tensors of the target that published drafts may carry; ours come from the target itself."""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SPECULATORS_VERSION = "0.9.0"
"""Version of the speculators library whose config schema is followed."""


@dataclass(frozen=True)
class VerifierInfo:
    """What a speculators config says about the target."""

    name_or_path: str | None = None
    architectures: tuple[str, ...] = ()

    @classmethod
    def of(cls, target: TargetSection) -> VerifierInfo:
        """Return what a config says about `target`; the speculators library loads the target by this name.

        Raises:
            TargetError: the target's config cannot be read.
        """
        config = load_target_config(target)
        return cls(target.model, tuple(config.architectures or ()))


@dataclass(frozen=True)
class ExportedDraft:
    """What `export_draft` wrote."""

    path: Path
    format: ExportFormat
    dtype: str
    tensors: int
    bytes: int


def export_draft(
    checkpoint: Path,
    out_dir: Path,
    format: ExportFormat = "sglang",
    *,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    embedding: Tensor | None = None,
    verifier: VerifierInfo | None = None,
    draft_tokens: int = 5,
) -> ExportedDraft:
    """Write the draft of `checkpoint` (``draft.safetensors``, ``config.json``) to `out_dir`, checked and read back.

    `embedding` [V, H_t], the target's, is included in ``hf`` format only (a draft with its own keeps that).
    `verifier` and `draft_tokens` go into the config of the ``speculators`` format. Files of an earlier export in
    `out_dir` are replaced, others left alone.

    Raises:
        IncompatibleDraft: config and tensors do not fit, a tensor overflows `dtype`, or the file does not read back
            bitwise; nothing is written over `out_dir` unless the tensors fit.
        ValueError: an option that the format has no place for.
    """
    if embedding is not None and format != "hf":
        raise ValueError(f"an embedding is written in hf format only, the format is {format}")
    if verifier is not None and format != "speculators":
        raise ValueError(f"a verifier is named in speculators format only, the format is {format}")
    config, masters = import_draft(checkpoint)
    tensors = {
        name: tensor.to(_DTYPES[dtype]).contiguous() if tensor.is_floating_point() else tensor.contiguous()
        for name, tensor in masters.items()
    }
    check_tensors(tensors, config, f"{checkpoint} as {dtype}")
    document = {**config.to_dict(), "dtype": dtype, "torch_dtype": dtype}
    if format == "speculators":
        document = _speculators_config(document, config, verifier or VerifierInfo(), draft_tokens)
        tensors = _speculators_tensors(tensors, whole=config.draft_vocab_size == config.vocab_size)
    if embedding is not None and not config.owns_embedding:
        expected = (config.vocab_size, config.target_hidden_size)
        if tuple(embedding.shape) != expected:
            raise IncompatibleDraft(f"{_EMBEDDING}: expected shape {list(expected)}, found {list(embedding.shape)}")
        tensors[_EMBEDDING] = embedding.to(_DTYPES[dtype]).contiguous()
    _write(out_dir, tensors, document)
    return ExportedDraft(
        path=out_dir,
        format=format,
        dtype=dtype,
        tensors=len(tensors),
        bytes=(out_dir / WEIGHTS).stat().st_size,
    )


def import_draft(path: Path) -> tuple[Eagle3Config, dict[str, Tensor]]:
    """Read a draft from `path`: an export in any of the three formats, or a checkpoint of a run.

    Returns the config and the tensors in serving names: weights in fp32, ``d2t`` int64 [K], ``t2d`` bool [V].

    Raises:
        IncompatibleDraft: no draft there, another method or variant than this project's, or tensors that do not fit
            the config (each one named).
    """
    document = _read_config(path)
    tensors = _read_tensors(path)
    if "speculators_model_type" in document:
        document = _from_speculators(document, path)
    config = _config_of(document, path)
    draft = {_serving_name(name): tensor for name, tensor in tensors.items()}
    for name in _PASSED_OVER:
        if name in draft and not (name == _EMBEDDING and config.owns_embedding):
            del draft[name]
            logger.info("%s: passed over %s, which is the target's", path, name)
    _complete_vocabulary(draft, config)
    check_tensors(draft, config, str(path))
    return config, {name: t.float() if t.is_floating_point() else t for name, t in draft.items()}


# --- reading -----------------------------------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise IncompatibleDraft(f"{path}: expected a draft's directory with {CONFIG}, found none")
    try:
        document = json.loads(file.read_text())
    except ValueError as error:
        raise IncompatibleDraft(f"{file}: expected JSON: {error}") from error
    if not isinstance(document, dict):
        raise IncompatibleDraft(f"{file}: expected a JSON object, found {type(document).__name__}")
    return document


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if (path / _INDEX).is_file():
        files = sorted(set(json.loads((path / _INDEX).read_text())["weight_map"].values()))
    else:
        files = [name for name in (WEIGHTS, CHECKPOINT_WEIGHTS) if (path / name).is_file()][:1]
    if not files:
        raise IncompatibleDraft(
            f"{path}: expected {WEIGHTS}, {_INDEX} or {CHECKPOINT_WEIGHTS}, found none; "
            "convert pickled weights to safetensors first"
        )
    tensors: dict[str, Tensor] = {}
    for name in files:
        try:
            tensors |= load_file(path / name)
        except (OSError, SafetensorError) as error:
            raise IncompatibleDraft(f"{path / name}: cannot be read as safetensors: {error}") from error
    return tensors


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


def _config_of(document: Mapping[str, Any], path: Path) -> Eagle3Config:
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
        raise IncompatibleDraft(f"{path / CONFIG}: not an EAGLE-3 draft of this project's kind: " + "; ".join(faults))
    try:
        return Eagle3Config.from_dict(document)
    except IncompatibleDraft as error:
        raise IncompatibleDraft(f"{path / CONFIG}: {error}") from error


def _from_speculators(document: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the serving-format config of a speculators config."""
    if document["speculators_model_type"] != "eagle3":
        raise IncompatibleDraft(
            f"{path / CONFIG}: expected speculators_model_type eagle3, found {document['speculators_model_type']}"
        )
    if document.get("norm_before_residual") is not False:
        raise IncompatibleDraft(
            f"{path / CONFIG}: expected norm_before_residual: false (the residual is taken before the norm), "
            f"found {document.get('norm_before_residual', 'nothing')}"
        )
    layer = dict(document.get("transformer_layer_config") or {})
    if layer.get("model_type") == "llama":  # fields that have the class's default are left out of such configs
        layer = LlamaConfig(**layer).to_dict()
    lifted = ("draft_vocab_size", "target_hidden_size", "fc_norm", "norm_before_fc", "norm_output")
    layer |= {field: document[field] for field in lifted if document.get(field) is not None}
    ids = document.get("eagle_aux_hidden_state_layer_ids")
    if ids:
        layer["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": [layer_id - 1 for layer_id in ids]}
    return layer


# --- writing -----------------------------------------------------------------------------------------------------


def _speculators_tensors(tensors: Mapping[str, Tensor], *, whole: bool) -> dict[str, Tensor]:
    renamed = {
        name.replace("midlayer.", "layers.0.", 1) if name.startswith("midlayer.") else name: tensor
        for name, tensor in tensors.items()
    }
    return {name: tensor for name, tensor in renamed.items() if not (whole and name in ("d2t", "t2d"))}


def _speculators_config(
    document: Mapping[str, Any], config: Eagle3Config, verifier: VerifierInfo, draft_tokens: int
) -> dict[str, Any]:
    """Return the config that vLLM and the speculators library read; `document` is the serving-format one."""
    own = {"architectures", "draft_vocab_size", "target_hidden_size", "fc_norm", "eagle_config"}
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
                    "speculative_tokens": draft_tokens,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": verifier.name_or_path, "architectures": list(verifier.architectures)},
        },
        "transformer_layer_config": layer,
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size if config.owns_embedding else None,
        "eagle_aux_hidden_state_layer_ids": [layer_id + 1 for layer_id in aux_layers] if aux_layers else None,
        "fc_norm": config.fc_norm,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "norm_output": False,
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "dtype": document["dtype"],
        "torch_dtype": document["torch_dtype"],
    }


def _write(out_dir: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / CONFIG).unlink(missing_ok=True)
    fresh = out_dir / f".{WEIGHTS}.tmp"
    save_tensors(tensors, fresh, {"format": "pt"})
    _check_read_back(fresh, tensors)
    fresh.replace(out_dir / WEIGHTS)
    write_atomically(out_dir / CONFIG, json.dumps(document, indent=2) + "\n")


def _check_read_back(file: Path, tensors: Mapping[str, Tensor]) -> None:
    found = load_file(file)
    different = [name for name in tensors if name not in found or not _same_bits(found[name], tensors[name])]
    if different or len(found) != len(tensors):
        raise IncompatibleDraft(
            f"{file}: does not read back as written: {different or sorted(set(found) - set(tensors))}"
        )


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.view(torch.uint8), second.view(torch.uint8))
