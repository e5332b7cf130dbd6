"""The few file operations that the file backend is made of, in one place: tests cut them at any boundary."""

from __future__ import annotations

import os
from pathlib import Path


class FileSystem:
    """Durable file operations. Every change to a channel's directory goes through one of these methods."""

    def names(self, directory: Path) -> list[str]:
        """Return the names in a directory."""
        return os.listdir(directory)  # noqa: PTH208 - called for each batch; names are all that is needed

    def open_append(self, path: Path) -> int:
        """Open a file for appending, made if need be, and return its descriptor."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, descriptor: int, data: bytes) -> None:
        """Write all of `data` at the end of the file."""
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]

    def sync(self, descriptor: int) -> None:
        """Make what was written survive a crash of the machine."""
        os.fdatasync(descriptor)

    def truncate(self, descriptor: int, size: int) -> None:
        """Cut a file to `size` bytes."""
        os.ftruncate(descriptor, size)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name; fails with `FileExistsError` if the name is taken."""
        target.hardlink_to(source)

    def replace(self, source: Path, target: Path) -> None:
        """Rename atomically over whatever is there."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Remove a file that may be gone already."""
        path.unlink(missing_ok=True)

    def sync_directory(self, directory: Path) -> None:
        """Make names that were made or replaced in a directory survive a crash of the machine."""
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def write_file(self, path: Path, data: bytes, *, durable: bool) -> None:
        """Write a whole new file, to be renamed or linked into place afterwards."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            self.write(descriptor, data)
            if durable:
                self.sync(descriptor)
        finally:
            os.close(descriptor)
