"""The frozen parts of a target that a draft needs: embedding, LM head and final norm, read without the rest.

Works on any Hugging Face layout of safetensors: one file, shards with an index, tied embeddings, and the text model
inside a multimodal wrapper. Tensors are found by the last part of their name among those of the right shape, so that
no list of architectures has to be kept; what stays ambiguous is an error, never a guess. Only headers and the tensors
themselves are read, and of a hub model only the files that hold them are fetched.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from disagg_core.errors import TargetError
from disagg_core.run_spec.document import TargetSection
from disagg_core.run_spec.section import is_local
from disagg_core.target.facts import is_tied, load_target_config
from disagg_core.target.text_model import logit_cap, logit_scale, shared_embedding_scale

logger = logging.getLogger(__name__)

_EMBEDDING = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embeddings.weight",
)
_LM_HEAD = ("lm_head.weight", "embed_out.weight", "output.weight", "output_layer.weight")
_FINAL_NORM = (
    "norm.weight",
    "final_layernorm.weight",
    "final_layer_norm.weight",
    "ln_f.weight",
    "norm_f.weight",
    "final_norm.weight",
    "embedding_norm.weight",
)
_PREFIXES = (
    "",
    "model.",
    "language_model.",
    "model.language_model.",
    "language_model.model.",
    "model.language_model.model.",
    "text_model.",
    "model.text_model.",
    "thinker.model.",
    "thinker.",
    "transformer.",
    "gpt_neox.",
    "backbone.",
    "model.decoder.",
    "decoder.",
)
"""Where the text model lies in a checkpoint, the more usual first; decides between tensors of the same last name."""
_NOT_TEXT = re.compile(r"(^|\.)(visual|vision\w*|audio\w*|talker|code\w*|mtp|layers|h|blocks|draft\w*)\.")
_UNIT_OFFSET = frozenset(
    [
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "vaultgemma",
        "recurrent_gemma",
        "qwen3_next",
        "qwen3_5",
        "qwen3_5_text",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
    ]
)
"""Model types whose RMSNorm multiplies by one plus the stored weight."""
_INDEX = "model.safetensors.index.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_SCALED = {"F8_E4M3", "F8_E5M2"}
_SCALES = ("_scale_inv", "_scale")
"""What is added to the name of a tensor in fp8; both names hold factors."""
_SCALE_BLOCK = 128
"""Rows and columns that share a scale, where there is one for each block."""


@dataclass(frozen=True)
class FinalNorm:
    """The target's last RMSNorm, for hidden states that were taken before it.

    `unit_offset` is Gemma's convention: the stored weight is the deviation from one.
    """

    weight: Tensor  # [H]
    eps: float
    unit_offset: bool

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the normed `hidden` [..., H], computed in fp32, in its own dtype."""
        states = hidden.float()
        states = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.eps)
        scale = self.weight.float() + 1.0 if self.unit_offset else self.weight.float()
        return (states * scale).to(hidden.dtype)


@dataclass(frozen=True)
class TargetParts:
    """The frozen tensors of a target; `logits` says how its logits follow from them (see `load_target_parts`)."""

    embedding: Tensor  # [V, H]
    lm_head: Tensor  # [V, H], the same tensor as `embedding` when tied and unscaled
    tied: bool
    final_norm: FinalNorm | None
    logit_cap: float | None = None
    logit_scale: float = 1.0  # factor that `lm_head` holds
    embedding_scale: float = 1.0  # factor on `embedding` in what SGLang gives a draft that has none of its own

    def logits(self, last_hidden_state: Tensor) -> Tensor:
        """Return the target's logits [..., V] of states after its final norm [..., H]."""
        return capped(last_hidden_state @ self.lm_head.T, self.logit_cap)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Return `logits` of any shape bounded by `cap` as Gemma 2 bounds them, ``cap * tanh(logits / cap)``."""
    return logits if cap is None else (logits / cap).tanh() * cap


def load_target_parts(
    target: TargetSection, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> TargetParts:
    """Read embedding [V, H], LM head [V, H] and final norm [H] of `target` in `dtype`.

    A constant factor on the target's logits (Cohere's `logit_scale`, Granite's `logits_scaling`) is folded into the
    LM head; a bound on them (Gemma 2) is `logit_cap`. `final_norm` is None when the checkpoint has no RMSNorm under a
    usual name; captured hidden states are normed already and do not need it. A tied embedding follows transformers:
    with both tensors in the checkpoint and different, they are not tied; with only the LM head there, it is the
    embedding too.

    Raises:
        TargetError: no such directory or file, not safetensors, a tensor that is missing, ambiguous, of another width
            than the config says or of fewer rows, quantised otherwise than to fp8, or a head with a bias, which no
            draft's loss can express.
    """
    config = load_target_config(target)
    text, checkpoint = config.get_text_config(), _Checkpoint.open(target)
    embedding_name, head_name = _names_of(checkpoint, config)
    norm_name = checkpoint.find(_FINAL_NORM, (text.hidden_size,))
    raw = {
        name: checkpoint.read(name, text.hidden_size if name == norm_name else text.vocab_size, dtype, device)
        for name in (embedding_name, head_name, norm_name)
        if name
    }
    embedding = raw[embedding_name or str(head_name)]
    head = raw[head_name] if head_name else embedding
    shared = is_tied(config) and (not head_name or not embedding_name or torch.equal(embedding, head))
    return TargetParts(
        embedding=embedding,
        lm_head=_scaled(embedding if shared else head, config),
        tied=shared,
        final_norm=_final_norm(raw[norm_name], text) if norm_name else None,
        logit_cap=logit_cap(text),
        logit_scale=logit_scale(config),
        embedding_scale=shared_embedding_scale(text),
    )


def check_target_parts(target: TargetSection) -> None:
    """Check that the parts of `target` are there, from the headers of its files alone.

    Raises:
        TargetError: as `load_target_parts`, for what headers say.
    """
    _names_of(_Checkpoint.open(target), load_target_config(target))


def _names_of(checkpoint: _Checkpoint, config: Any) -> tuple[str | None, str | None]:
    """Return the names of embedding and LM head; of a tied target's, one may be None."""
    text = config.get_text_config()
    shape = (text.vocab_size, text.hidden_size)
    tied = is_tied(config)
    embedding_name = checkpoint.find(_EMBEDDING, shape)
    head_name = checkpoint.find(_LM_HEAD, shape)
    if head_name and checkpoint.has(head_name.removesuffix("weight") + "bias"):
        raise TargetError(
            f"{checkpoint.source}: the LM head {head_name} has a bias; drafts of such targets cannot train"
        )
    if not (embedding_name and head_name) and not (tied and (embedding_name or head_name)):
        what, names = ("an embedding", _EMBEDDING) if not embedding_name else ("an LM head", _LM_HEAD)
        raise TargetError(
            f"{checkpoint.source}: expected {what} of shape {list(shape)} whose name ends with one of {list(names)}, "
            f"found {checkpoint.similar(names) or 'none'}; the config says tie_word_embeddings={tied}"
        )
    return embedding_name, head_name


def dequantised(weight: Tensor, scale: Tensor, *, whole_rows: int) -> Tensor:
    """Return an fp8 `weight` [V, H], the first rows of `whole_rows`, in fp32.

    `scale` is one for the whole tensor, one for each row, or one for each block: of 128 rows and columns where that
    fits its shape, else of as many as it takes.

    Raises:
        TargetError: `scale` has another shape.
    """
    if scale.numel() == 1:
        return weight.float() * scale.float().reshape(())
    if scale.shape[0] == whole_rows and scale.numel() == whole_rows:
        return weight.float() * scale.float().reshape(-1, 1)[: len(weight)]
    if scale.dim() != 2:
        raise TargetError(f"fp8 scales: expected one, one for each row or block, found shape {list(scale.shape)}")
    for place, size in enumerate((whole_rows, weight.shape[1])):
        blocks = scale.shape[place]
        block = _SCALE_BLOCK if math.ceil(size / _SCALE_BLOCK) == blocks else math.ceil(size / blocks)
        scale = scale.repeat_interleave(block, dim=place)
    return weight.float() * scale.float()[: weight.shape[0], : weight.shape[1]]


def parts_of(target: Any) -> tuple[Tensor, Tensor]:
    """Return embedding and LM head, each [V, H], of a loaded transformers causal language model, as `load_target_parts`
    reads them; on the device of the embedding, and not copied unless the logits are scaled. Rows beyond the vocabulary
    are left out.
    """
    rows = target.config.get_text_config().vocab_size
    embedding: Tensor = target.get_input_embeddings().weight
    head: Tensor = target.get_output_embeddings().weight
    embedding, head = (part if len(part) == rows else part[:rows] for part in (embedding, head))
    return embedding, _scaled(head.to(embedding.device), target.config)


def _scaled(head: Tensor, config: Any) -> Tensor:
    factor = logit_scale(config)
    return head if factor == 1.0 else head * factor


def _final_norm(weight: Tensor, text: Any) -> FinalNorm | None:
    if not hasattr(text, "rms_norm_eps"):
        return None
    return FinalNorm(weight, float(text.rms_norm_eps), unit_offset=text.model_type in _UNIT_OFFSET)


class _Checkpoint:
    """The tensors of a model directory or hub repository: names and shapes from headers, data on demand."""

    def __init__(self, source: str, files: Mapping[str, str], resolve: Mapping[str, Path]) -> None:
        self.source = source
        self._files = files  # tensor name -> file name
        self._resolve = resolve

    @classmethod
    def open(cls, target: TargetSection) -> _Checkpoint:
        """Find the weight files of `target`; of a hub model fetch the index and, later, only the files needed."""
        files: Mapping[str, Path]
        if is_local(target.model):
            root = Path(target.model).expanduser()
            files = {path.name: path for path in sorted(root.glob("*.safetensors*")) if path.is_file()}
        else:
            files = _HubFiles(target.model, target.revision)
        if _INDEX in files:
            return cls(target.model, json.loads(files[_INDEX].read_text())["weight_map"], files)
        names = ["model.safetensors"] if "model.safetensors" in files else [f for f in files if f.startswith("model-")]
        if not names:
            raise TargetError(
                f"{target.model}: expected model.safetensors or {_INDEX}, found "
                f"{sorted(files) or 'no safetensors file'}; convert the weights to safetensors "
                "(save_pretrained of transformers does)"
            )
        weights = {}
        for file in names:
            with safe_open(files[file], framework="pt") as opened:
                weights.update(dict.fromkeys(opened.keys(), file))
        return cls(target.model, weights, files)

    def has(self, name: str) -> bool:
        """Tell whether the checkpoint holds a tensor of this name."""
        return name in self._files

    def similar(self, endings: Sequence[str]) -> list[str]:
        """Return names and shapes of all tensors with one of `endings`, whatever their place."""
        names = sorted(name for name in self._files if name.endswith(tuple(endings)))[:8]
        return [f"{name} {list(self._shape(name))}" for name in names]

    def find(self, endings: Sequence[str], shape: tuple[int, ...]) -> str | None:
        """Return the text model's tensor with one of `endings` and this `shape`, or None; more rows do as well.

        Raises:
            TargetError: several fit and none lies in a usual place.
        """
        shapes = {name: self._shape(name) for name in self._candidates(endings)}
        fitting = [name for name, found in shapes.items() if found == shape]
        if not fitting:
            fitting = [name for name, found in shapes.items() if found[1:] == shape[1:] and found[0] > shape[0]]
        for prefix in _PREFIXES:
            for ending in endings:
                if prefix + ending in fitting:
                    return prefix + ending
        if len(fitting) > 1:
            raise TargetError(f"{self.source}: expected one tensor of shape {list(shape)}, found {fitting}")
        return fitting[0] if fitting else None

    def _candidates(self, endings: Sequence[str]) -> Iterator[str]:
        for name in self._files:
            if any(name == ending or name.endswith("." + ending) for ending in endings) and not _NOT_TEXT.search(name):
                yield name

    def _path(self, name: str) -> Path:
        file = self._files[name]
        if file not in self._resolve:
            raise TargetError(f"{self.source}: the index places {name} in {file}, which is missing")
        return self._resolve[file]

    def _shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self._path(name), framework="pt") as opened:
            return tuple(opened.get_slice(name).get_shape())

    def read(self, name: str, rows: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Return the first `rows` of the tensor called `name`, converted; only their bytes are read."""
        with safe_open(self._path(name), framework="pt") as opened:
            part = opened.get_slice(name)
            kind, found = part.get_dtype(), part.get_shape()[0]
            if kind not in {*_FLOATS, *_SCALED}:
                raise TargetError(
                    f"{self.source}: expected {name} in one of {sorted(_FLOATS)}, or in fp8 with its "
                    f"scales, found {kind}"
                )
            tensor: Tensor = part[:rows]
        if found > rows:
            logger.info("%s: %s has %d rows, of which the first %d are the vocabulary", self.source, name, found, rows)
        if kind in _SCALED:
            tensor = dequantised(tensor, self._scales(name), whole_rows=found)
        return tensor.to(device=device, dtype=dtype)

    def _scales(self, name: str) -> Tensor:
        """Return the scales of the fp8 tensor called `name`."""
        names = [name + ending for ending in _SCALES if self.has(name + ending)]
        if not names:
            raise TargetError(
                f"{self.source}: expected the scales of {name}, which is in fp8, as {name}{' or '.join(_SCALES)}, "
                "found none"
            )
        with safe_open(self._path(names[0]), framework="pt") as opened:
            scale: Tensor = opened.get_tensor(names[0])
        return scale


class _HubFiles(Mapping[str, Path]):
    """Files of a hub repository by name, fetched into the Hugging Face cache when first asked for."""

    def __init__(self, repo: str, revision: str | None) -> None:
        self._repo = repo
        self._revision = revision
        self._found: dict[str, Path | None] = {}

    def _fetch(self, name: str) -> Path | None:
        from transformers.utils import cached_file

        if name not in self._found:
            try:
                found = cached_file(
                    self._repo, name, revision=self._revision, _raise_exceptions_for_missing_entries=False
                )
            except OSError as error:
                raise TargetError(f"{self._repo}: cannot fetch {name}: {str(error).splitlines()[0]}") from error
            self._found[name] = Path(found) if found else None
        return self._found[name]

    def __getitem__(self, name: str) -> Path:
        path = self._fetch(name)
        if path is None:
            raise KeyError(name)
        return path

    def __iter__(self) -> Iterator[str]:
        return iter(name for name, path in self._found.items() if path)

    def __len__(self) -> int:
        return sum(1 for path in self._found.values() if path)
