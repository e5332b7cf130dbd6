"""Tensors of a checkpoint in safetensors files that all ranks write and read together.

The storage of `torch.distributed.checkpoint`. To it a tensor is called ``<file>:<name>``. Every file is one whole
safetensors file, whatever the number of ranks: the coordinator lays it out, each rank writes its rows in place. FSDP2
shards rows, so that what a rank has of a tensor is one range of bytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from disagg_core.errors import CheckpointError

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}
_LENGTH_BYTES = 8
_WRITE_BYTES = 64 << 20


def key_of(file: str, name: str) -> str:
    """Return what DCP calls the tensor `name` of `file`, a path in the checkpoint."""
    return f"{file}:{name}"


def _split(key: str) -> tuple[str, str]:
    file, _, name = key.partition(":")
    return file, name


def keyed(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of `files`, by file and name, as DCP calls them."""
    return {key_of(file, name): tensor for file, tensors in files.items() for name, tensor in tensors.items()}


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where the coordinator has put things: the directory that is written, and where in its file a tensor begins."""

    directory: str
    offsets: dict[str, int]


class SafetensorsWriter(StorageWriter):
    """Writes the tensors of one save into a new directory below `root`; every rank has one of its own.

    On the coordinator `directory` is the name of that directory, `files` are those to write, also where one has no
    tensor; `prepare` is called before it is made, and `finish` once all ranks have written and synced their rows.
    """

    def __init__(
        self,
        root: Path,
        directory: str,
        files: Sequence[str],
        *,
        prepare: Callable[[], None],
        finish: Callable[[Path], None],
    ) -> None:
        self._root = root
        self._directory = directory
        self._files = files
        self._prepare = prepare
        self._finish = finish

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Tell whether a checkpoint may lie there: one is never asked for by its id."""
        return False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin a save."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up before the plan is known."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Take the rank's plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Make the directory and its files, each with its header, and tell all ranks where their rows go."""
        tensors: dict[str, dict[str, WriteItem]] = {file: {} for file in self._files}
        for item in (item for plan in plans for item in plan.items):
            file, name = _split(item.index.fqn)
            tensors[file][name] = item
        place = self._root / self._directory
        self._prepare()
        place.mkdir()
        layout = _Layout(self._directory, {})
        for file, items in tensors.items():
            layout.offsets.update(_begin_file(place / file, file, items))
        return [dataclasses.replace(plan, storage_data=layout) for plan in plans]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's rows, down to the disk."""
        layout = plan.storage_data
        assert isinstance(layout, _Layout)
        by_file: dict[str, list[WriteItem]] = {}
        for item in plan.items:
            by_file.setdefault(_split(item.index.fqn)[0], []).append(item)
        for file, items in by_file.items():
            handle = os.open(self._root / layout.directory / file, os.O_WRONLY)
            try:
                for item in items:
                    tensor = planner.resolve_data(item)
                    assert isinstance(tensor, Tensor)
                    _write_rows(handle, layout.offsets[item.index.fqn], item, tensor)
                os.fsync(handle)
            finally:
                os.close(handle)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Complete the directory, on the coordinator; what DCP knows of the tensors is in their files."""
        self._finish(self._root / self._directory)


def _begin_file(path: Path, file: str, items: Mapping[str, WriteItem]) -> dict[str, int]:
    """Write the header of a file at its full length; return where each of its tensors begins, by key."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    begins: dict[str, int] = {}
    # The widest dtypes first, so that every tensor lies at a multiple of its own.
    for name, item in sorted(items.items(), key=lambda pair: (-_tensor_of(pair[1])[1].itemsize, pair[0])):
        size, dtype = _tensor_of(item)
        begins[key_of(file, name)] = end
        end += size.numel() * dtype.itemsize
        offsets = [begins[key_of(file, name)], end]
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(size), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    data = _LENGTH_BYTES + len(text)
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as stream:
        stream.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        stream.truncate(data + end)
    return {key: data + begin for key, begin in begins.items()}


def _tensor_of(item: WriteItem) -> tuple[torch.Size, torch.dtype]:
    """Return the shape and dtype of the whole tensor that `item` is a part of."""
    assert item.tensor_data is not None
    return item.tensor_data.size, item.tensor_data.properties.dtype


def _write_rows(handle: int, begin: int, item: WriteItem, tensor: Tensor) -> None:
    """Write a rank's rows of a tensor that begins at `begin` of the file."""
    assert item.tensor_data is not None
    size, chunk = item.tensor_data.size, item.tensor_data.chunk
    assert chunk.sizes[1:] == size[1:], f"{item.index.fqn}: expected whole rows, found {chunk} of {list(size)}"
    row = size[1:].numel() if size else 0
    at = begin + (chunk.offsets[0] * row * tensor.element_size() if size else 0)
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for first in range(0, len(data), _WRITE_BYTES):
        piece = data[first : first + _WRITE_BYTES]
        while piece:
            written = os.pwrite(handle, piece, at)
            at, piece = at + written, piece[written:]


class SafetensorsReader(StorageReader):
    """Reads tensors of the given `files` of the checkpoint in `directory`, of each tensor what a rank needs.

    Raises:
        CheckpointError: a file cannot be read.
    """

    def __init__(self, directory: Path, files: Sequence[str]) -> None:
        self._directory = directory
        self.tensors: dict[str, TensorStorageMetadata] = {}
        for file in files:
            for name, entry in _header_of(directory / file).items():
                size = torch.Size(entry["shape"])
                chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
                properties = TensorProperties(_BY_NAME[entry["dtype"]])
                self.tensors[key_of(file, name)] = TensorStorageMetadata(properties, size, [chunk])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Tell whether a checkpoint may lie there: one is never asked for by its id."""
        return False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin to read."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what the headers say."""
        return Metadata(dict(self.tensors))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Take the rank's plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Take the plans of all ranks as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan asks for into the tensors that are there for it."""
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(_split(item.storage_index.fqn)[0], []).append(item)
        for file, items in by_file.items():
            with safe_open(self._directory / file, framework="pt") as opened:
                for item in items:
                    name = _split(item.storage_index.fqn)[1]
                    part = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                    tensor = opened.get_slice(name)[part] if part else opened.get_tensor(name)
                    into = planner.resolve_tensor(item).detach()
                    into.copy_(tensor)
                    planner.commit_tensor(item, into)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _header_of(path: Path) -> dict[str, Any]:
    """Return the entries of a safetensors file's header by the names of its tensors."""
    try:
        with path.open("rb") as stream:
            header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(_LENGTH_BYTES), "little")))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); use an older checkpoint") from error
    header.pop("__metadata__", None)
    return header
