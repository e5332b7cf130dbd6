"""Writes safetensors files that others can read: with the permissions that any new file gets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

CHECKPOINT_WEIGHTS = "draft.safetensors"
"""The file with the draft's tensors in a checkpoint of a run, which is a loadable draft too."""


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write `tensors` and `metadata` to `file`; what was there is replaced, not atomically.

    safetensors by itself makes files that only their owner can read, whatever the umask.

    Raises:
        OSError, SafetensorError: it cannot be written, as on a full disk; no part of it stays.
    """
    file.unlink(missing_ok=True)
    file.touch()
    mode = file.stat().st_mode
    try:
        # Of no tensors and an empty table of metadata safetensors makes a file that it cannot read.
        save_file(dict(tensors), file, metadata=dict(metadata) or None)
    except (OSError, SafetensorError):
        file.unlink(missing_ok=True)
        raise
    file.chmod(mode)
