"""What is known about a target from its config alone: sizes, dtype, fingerprints.

Needs no weights and imports transformers only when called, so that planning works before a GPU is held.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from disagg_core.contracts import DTYPE_BYTES
from disagg_core.errors import TargetError
from disagg_core.run_spec.document import TargetSection
from disagg_core.run_spec.section import is_local
from disagg_core.target.text_model import (
    logit_cap,
    logit_scale,
    shared_embedding_scale,
    sizes_of,
    text_config,
    token_ids,
    value_of,
)

_VOLATILE = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})


class TargetFacts(BaseModel):
    """The sizes of a target's text model; `commit` is the hub's, None for a directory.

    `rope_parameters` are one flat set, empty for a target without RoPE; `eos_token_ids` are those of the config and of
    the generation config together; logits are ``z = logit_scale * last_hidden_state @ lm_head.T``, capped as
    ``logit_cap * tanh(z / logit_cap)``. A draft without an embedding of its own is given the target's times
    `embedding_scale` when it is served.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: dict[str, Any]
    tie_word_embeddings: bool
    logit_cap: float | None = None
    logit_scale: float = 1.0
    embedding_scale: float = 1.0
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    dtype: str
    version: str
    commit: str | None = None

    def describe(self) -> str:
        """Return one line about the target, for people."""
        ends = f"texts end with {', '.join(map(str, self.eos_token_ids))}" if self.eos_token_ids else "no end of text"
        return (
            f"{self.model} ({self.model_type}, {self.num_layers} layers, hidden {self.hidden_size}, "
            f"vocabulary {self.vocab_size}, {self.dtype}, {ends})"
        )


def read_target_facts(target: TargetSection) -> TargetFacts:
    """Read the target's config and return its facts.

    Raises:
        TargetError: there is no such model or config, or it is no causal language model.
    """
    config = load_target_config(target)
    text = text_config(config)
    if target.backend == "transformers":
        model_class(config)
    eos = token_ids(*(getattr(part, "eos_token_id", None) for part in (config, text, _generation_config(target))))
    dtype: str = target.dtype
    if dtype == "auto":
        dtype = str(value_of(text, "dtype") or value_of(config, "dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise TargetError(f"target.dtype: expected one of {sorted(DTYPE_BYTES)}, found {dtype} in the model's config")
    commit = getattr(config, "_commit_hash", None)
    return TargetFacts(
        model=target.model,
        model_type=text.model_type,
        **sizes_of(text),
        tie_word_embeddings=is_tied(config),
        logit_cap=logit_cap(text),
        logit_scale=logit_scale(config),
        embedding_scale=shared_embedding_scale(text),
        bos_token_id=value_of(text, "bos_token_id"),
        eos_token_ids=eos,
        pad_token_id=value_of(text, "pad_token_id"),
        dtype=dtype,
        version=target_version(target, {**config.to_dict(), "end_of_text": eos}, commit=commit),
        commit=commit,
    )


def load_target_config(target: TargetSection) -> Any:
    """Return the target's transformers config, wrapper and all.

    Raises:
        TargetError: there is no such model, or its config cannot be read.
    """
    from transformers import AutoConfig

    source = _config_source(target)
    try:
        return AutoConfig.from_pretrained(source, revision=target.revision, trust_remote_code=target.trust_remote_code)
    except (OSError, ValueError) as error:
        raise TargetError(
            f"target.model: cannot read the config of {source!r}: {str(error).splitlines()[0]}; check the name, "
            "or point target.config at a directory with its config.json"
        ) from error


def _config_source(target: TargetSection) -> str:
    source = target.config or target.model
    if not is_local(source):
        return source
    path = Path(source).expanduser()
    if not path.exists():
        raise TargetError(f"target.model: no such directory: {path}; give a directory with config.json or a hub id")
    return str(path)


def _generation_config(target: TargetSection) -> Any:
    """Return the target's generation config, or None where it has none."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(_config_source(target), revision=target.revision)
    except OSError:
        return None  # transformers' word for "no such file"


def is_tied(config: Any) -> bool:
    """Tell whether embedding and LM head of a model of this `config`, wrapper and all, are one tensor."""
    return any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))


def model_class(config: Any) -> Any:
    """Return the class of transformers that loads a model of this `config` with its LM head.

    Of a multimodal model that has no class for its text alone it is the whole, of which only the text part is run.

    Raises:
        TargetError: transformers has none.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    known = [
        auto for auto in (AutoModelForCausalLM, AutoModelForImageTextToText) if type(config) in auto._model_mapping
    ]
    if known:
        return known[0]
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    raise TargetError(
        f"target.model: expected a language model of transformers, found {config.model_type}, for which the installed "
        "release has no class with an LM head"
    )


def target_version(target: TargetSection, config: dict[str, Any], *, commit: str | None = None) -> str:
    """Return the fingerprint of a target's revision: a hash over its config and the index of its weights.

    For a directory the index is the name and size of each weight file, with header, first and last megabyte of each
    safetensors file; for a hub model it is the `commit` that the config came from, or the revision that was asked for.
    """
    digest = hashlib.sha256()
    stable = {key: value for key, value in config.items() if key not in _VOLATILE}
    digest.update(json.dumps(stable, sort_keys=True, default=str).encode())
    if is_local(target.model):
        _add_weights(digest, Path(target.model).expanduser())
    else:
        digest.update(f"{target.model}@{commit or target.revision or 'main'}".encode())
    return digest.hexdigest()[:16]


def model_fingerprint(model: str, revision: str | None) -> str:
    """Return what tells two models apart without transformers: by the files of a directory, by name of a hub model.

    Unlike `target_version` it is the same under every version of transformers, so two environments can compare it.
    """
    directory = Path(model).expanduser()
    if not directory.is_dir():
        return f"{model}@{revision or 'main'}"
    config = json.loads((directory / "config.json").read_text())
    digest = hashlib.sha256()
    stable = {key: value for key, value in config.items() if key not in _VOLATILE}
    digest.update(json.dumps(stable, sort_keys=True).encode())
    _add_weights(digest, directory)
    return digest.hexdigest()[:16]


def _add_weights(digest: hashlib._Hash, directory: Path) -> None:
    for path in sorted(directory.glob("*.safetensors*")):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        digest.update(_weights_sample(path) if path.suffix == ".safetensors" else path.read_bytes())


def _weights_sample(path: Path) -> bytes:
    """Return the header of a safetensors file with the first and last megabyte of its data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        sample = file.read(min(length, 64 * 1024**2)) + file.read(1024**2)
        file.seek(max(file.tell(), path.stat().st_size - 1024**2))
        return sample + file.read(1024**2)
