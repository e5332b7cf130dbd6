"""A folder for the temporary files of one process that we start, and of its descendants: removed once they have ended.

SGLang names a file for each of its sockets at every start and removes none of them.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path


class Scratch:
    """The folder of one process, also noted in the file `notes` for the case that we are killed with it.

    It lies beside other temporary files and not with the run: the name of a socket has about 100 bytes.
    """

    def __init__(self, notes: Path, prefix: str) -> None:
        self._notes = notes
        self._prefix = f"{prefix}-"

    def make(self) -> dict[str, str]:
        """Make the folder; return the variables with which a process uses it."""
        self._notes.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=self._prefix)
        self._notes.write_text(folder)
        return {"TMPDIR": folder}

    def remove(self) -> None:
        """Remove the folder that was noted, with all that is in it. Only once all processes that use it have ended."""
        if self._notes.is_file():
            folder = Path(self._notes.read_text())
            if folder.name.startswith(self._prefix) and folder.parent == Path(tempfile.gettempdir()):
                shutil.rmtree(folder, ignore_errors=True)
            self._notes.unlink()
