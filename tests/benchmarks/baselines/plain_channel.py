"""The plain way to stream references through a file, to compare with: one open, write and fsync for each reference.

The reader opens the file at each poll, goes to its last offset, and parses what is new with the standard library. No
claims, no checksums, no sequence numbers, no recovery.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec

from disagg_core.contracts import SampleRef


class PlainChannel:
    """Publishes and polls references in one JSON-lines file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = 0

    def publish(self, ref: SampleRef) -> None:
        """Append one reference, durably."""
        with self.path.open("a") as file:
            file.write(json.dumps(msgspec.to_builtins(ref)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def poll(self, max_n: int) -> list[dict[str, Any]]:
        """Return up to `max_n` new references, as dictionaries."""
        refs: list[dict[str, Any]] = []
        with self.path.open() as file:
            file.seek(self.offset)
            while len(refs) < max_n and (line := file.readline()):
                refs.append(json.loads(line))
            self.offset = file.tell()
        return refs
