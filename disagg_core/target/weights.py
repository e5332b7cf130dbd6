"""How many bytes a target's weights take once they are loaded: counted, not estimated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from disagg_core.run_spec.document import TargetSection
from disagg_core.run_spec.section import is_local
from disagg_core.target.facts import load_target_config, model_class

_CAST = {"F64", "F32", "F16", "BF16"}
"""Data types in files that loading turns into the one asked for; others (fp8, packed integers) are kept."""


def weight_bytes(target: TargetSection, dtype: torch.dtype) -> int:
    """Return what the weights of `target` take in `dtype`, in bytes.

    Of a directory with safetensors it is what their headers say; without files the model is built without memory, from
    its config.

    Raises:
        TargetError: there is no such model.
    """
    files = sorted(Path(target.model).expanduser().glob("*.safetensors")) if is_local(target.model) else []
    if files:
        return sum(_bytes_of(tensor, dtype) for file in files for tensor in _header(file).values())
    return parameters(target) * dtype.itemsize


def parameters(target: TargetSection) -> int:
    """Return how many parameters a model of the target's config has; tied ones count once."""
    config = load_target_config(target)
    with torch.device("meta"):
        model = model_class(config).from_config(config, trust_remote_code=target.trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def _header(file: Path) -> Mapping[str, Any]:
    """Return what the header of a safetensors file says of each tensor (https://github.com/huggingface/safetensors)."""
    with file.open("rb") as opened:
        header: dict[str, Any] = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    header.pop("__metadata__", None)
    return header


def _bytes_of(tensor: Mapping[str, Any], dtype: torch.dtype) -> int:
    start, end = tensor["data_offsets"]
    if tensor["dtype"] not in _CAST:
        return int(end - start)
    count = 1
    for size in tensor["shape"]:
        count *= size
    return count * dtype.itemsize
