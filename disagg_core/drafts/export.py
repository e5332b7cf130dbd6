"""Drafts on disk in the formats that others load: written, checked, read back, and read in again.

What all draft methods share: the files, the cast to a dtype, and that ``config.json`` is written last, so that a
directory with one is whole. Names, config and checks of the tensors are each method's own (`DraftMethod.read` and
`DraftMethod.written`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from disagg_core.drafts.method import DraftConfig, DraftMethod, ExportRequest, FrozenParts
from disagg_core.drafts.registry import method_names, method_of
from disagg_core.drafts.tensor_files import CHECKPOINT_WEIGHTS, save_tensors
from disagg_core.errors import BadInput, IncompatibleDraft
from disagg_core.files import write_atomically
from disagg_core.run_spec.document import TargetSection
from disagg_core.target.facts import load_target_config

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_PICKLED = "pytorch_model.bin"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class VerifierInfo:
    """What an export says about the target, in formats that name it."""

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
    format: str
    dtype: str
    tensors: int
    bytes: int


class ImportedDraft(NamedTuple):
    """A draft as it lies on disk; `state` is what `DraftModel.load_serving_state_dict` takes, weights in fp32."""

    method: DraftMethod
    config: DraftConfig
    state: dict[str, Tensor]


def export_draft(
    checkpoint: Path,
    out_dir: Path,
    format: str | None = None,
    *,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    parts: FrozenParts | None = None,
    verifier: VerifierInfo | None = None,
    draft_tokens: int = 5,
) -> ExportedDraft:
    """Write the draft of `checkpoint` (``draft.safetensors``, ``config.json``) to `out_dir`, checked and read back.

    `format` is one of the method's, by default its first (``sglang`` for EAGLE-3); `parts` of the target are for
    formats that hold some of them, `verifier` for formats that name the target. Files of an earlier export in `out_dir`
    are replaced, others left alone.

    Raises:
        IncompatibleDraft: config and tensors do not fit, a tensor overflows `dtype`, or the file does not read back
            bitwise; nothing is written over `out_dir` unless the tensors fit.
        BadInput: no such format, an option that it has no room for, or `out_dir` holds another model.
    """
    _refuse_other_models(out_dir)
    method, config, masters = import_draft(checkpoint)
    format = next(iter(method.formats)) if format is None else format
    _check_options(method, format, parts, verifier)
    verifier = verifier or VerifierInfo()
    request = ExportRequest(format, dtype, draft_tokens, verifier.name_or_path, verifier.architectures)
    document, tensors = method.written(config, _cast(masters, dtype, checkpoint), request, parts)
    _write(out_dir, tensors, document)
    return ExportedDraft(
        path=out_dir,
        format=format,
        dtype=dtype,
        tensors=len(tensors),
        bytes=(out_dir / WEIGHTS).stat().st_size,
    )


def import_draft(path: Path) -> ImportedDraft:
    """Read a draft from `path`: an export in any format of any method, or a checkpoint of a run.

    Raises:
        IncompatibleDraft: no draft there, another method or variant than this project's, or tensors that do not fit
            the config (each one named).
    """
    document = _read_config(path)
    method = _known_method(document, path)
    config, state = method.read(document, _read_tensors(path), str(path))
    return ImportedDraft(method, config, state)


def method_at(path: Path) -> DraftMethod:
    """Return the method of the draft in `path`, by its config alone.

    Raises:
        IncompatibleDraft: no draft is there, or one of another method than this project's.
    """
    return _known_method(_read_config(path), path)


# --- reading ----------------------------------------------------------------------------------------------------------


def _known_method(document: Mapping[str, Any], path: Path) -> DraftMethod:
    method = _method_of(document)
    if method is None:
        known = ", ".join(method_of(name).title for name in method_names())
        said = {key: document[key] for key in ("architectures", "speculators_model_type") if key in document}
        raise IncompatibleDraft(f"{path / CONFIG}: expected the config of a draft ({known}), found {said or 'another'}")
    return method


def _method_of(document: Mapping[str, Any]) -> DraftMethod | None:
    methods = map(method_of, method_names())
    return next((method for method in methods if method.recognises(document)), None)


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
        files = [name for name in (WEIGHTS, CHECKPOINT_WEIGHTS, _PICKLED) if (path / name).is_file()][:1]
    if not files:
        raise IncompatibleDraft(f"{path}: expected {WEIGHTS}, {_INDEX}, {CHECKPOINT_WEIGHTS} or {_PICKLED}, found none")
    tensors: dict[str, Tensor] = {}
    for name in files:
        tensors |= _read_pickled(path / name) if name == _PICKLED else _read_safetensors(path / name)
    return tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise IncompatibleDraft(f"{file}: cannot be read as safetensors: {error}") from error
    return tensors


def _read_pickled(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that `torch.save` wrote; nothing in it but tensors is ever run or made."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise IncompatibleDraft(f"{file}: cannot be read as tensors alone: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise IncompatibleDraft(f"{file}: expected tensors by name, found {type(found).__name__} with other things")
    tensors: dict[str, Tensor] = found
    return tensors


# --- writing ----------------------------------------------------------------------------------------------------------


def _refuse_other_models(out_dir: Path) -> None:
    """Refuse a directory whose files are those of another model, or of a checkpoint: none of them would be left whole.

    Raises:
        BadInput: the files are named.
    """
    found = [name for name in (_INDEX, CHECKPOINT_WEIGHTS) if (out_dir / name).exists()]
    if (out_dir / CONFIG).exists() and not _is_draft(out_dir):
        found.append(CONFIG)
    if found:
        raise BadInput(
            f"{out_dir}: expected no directory, or one with nothing but an earlier export to replace, found "
            f"{', '.join(found)} of another model or a checkpoint; export to another directory"
        )


def _is_draft(path: Path) -> bool:
    try:
        return _method_of(_read_config(path)) is not None
    except IncompatibleDraft:
        return False


def _check_options(method: DraftMethod, format: str, parts: FrozenParts | None, verifier: VerifierInfo | None) -> None:
    if format not in method.formats:
        raise BadInput(f"format: expected one of {', '.join(method.formats)} for {method.title}, found {format!r}")
    if parts is not None and not method.formats[format].holds_parts:
        fitting = [name for name, known in method.formats.items() if known.holds_parts]
        raise BadInput(f"the target's parts are written in {', '.join(fitting) or 'no'} format only, found {format}")
    if verifier is not None and not method.formats[format].names_target:
        fitting = [name for name, known in method.formats.items() if known.names_target]
        raise BadInput(f"a verifier is named in {', '.join(fitting) or 'no'} format only, found {format}")


def _cast(masters: Mapping[str, Tensor], dtype: str, checkpoint: Path) -> dict[str, Tensor]:
    """Return `masters` with weights in `dtype`; what is no weight keeps its own."""
    tensors = {
        name: tensor.to(_DTYPES[dtype]).contiguous() if tensor.is_floating_point() else tensor.contiguous()
        for name, tensor in masters.items()
    }
    faults = [
        f"{name}: has values that are not finite"
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all()
    ]
    if faults:
        raise IncompatibleDraft(f"{checkpoint} as {dtype}: " + "; ".join(faults))
    return tensors


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
