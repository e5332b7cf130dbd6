"""The held-out samples of a run, as files: captured once, read by every attempt, never a part of the stream.

::

    heldout/
      0.safetensors ...         one sample each: its id in the header, the tensors of `Capture.features`
      manifest.json             what they were captured from, and how many there are; written last
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from disagg_core.contracts import Capture, RunIdentity
from disagg_core.errors import DamagedHeldOut
from disagg_core.files import write_atomically

_MANIFEST = "manifest.json"
_SAMPLE_ID = "sample_id"


class _Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the samples are; they are captured anew where one of these is another, but for their number."""

    target: str
    tokenizer: str
    capture: Capture
    dtype: str
    samples: int = 0


class HeldOutFiles:
    """The held-out samples in `directory`, captured as `identity` says."""

    def __init__(self, directory: Path, identity: RunIdentity) -> None:
        self._directory = directory
        self._origin = _Manifest(
            identity.target_model_version, identity.tokenizer_version, identity.capture, identity.dtype
        )

    @property
    def count(self) -> int | None:
        """How many samples there are; None where they are not there, not whole, or captured from something else."""
        try:
            found = msgspec.json.decode((self._directory / _MANIFEST).read_bytes(), type=_Manifest)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        return found.samples if msgspec.structs.replace(found, samples=0) == self._origin else None

    def write(self, samples: Iterable[tuple[str, Mapping[str, Tensor]]]) -> int:
        """Write the `samples`, (id, tensors) each, in place of what is there; return how many there are.

        Raises:
            OSError, SafetensorError: they cannot be written; there are none then.
        """
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True)
        count = 0
        for sample_id, tensors in samples:
            # Of a captured sample they may share one block of memory, which a file of tensors cannot say.
            own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
            save_file(own, self._place(count), {_SAMPLE_ID: sample_id})
            count += 1
        manifest = msgspec.structs.replace(self._origin, samples=count)
        write_atomically(self._directory / _MANIFEST, msgspec.json.encode(manifest))
        return count

    def read(self, number: int) -> tuple[str, dict[str, Tensor]]:
        """Return the id and the tensors of sample `number`, on the CPU.

        Raises:
            DamagedHeldOut: it cannot be read.
        """
        place = self._place(number)
        try:
            with safe_open(place, framework="pt") as file:
                sample_id = file.metadata()[_SAMPLE_ID]
            return sample_id, load_file(place)
        except (OSError, SafetensorError) as error:
            raise DamagedHeldOut(
                f"{place}: a held-out sample cannot be read ({error}); remove {self._directory} and resume: they are "
                "captured again"
            ) from error

    def _place(self, number: int) -> Path:
        return self._directory / f"{number}.safetensors"
