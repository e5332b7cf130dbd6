"""Claims as files: ``writer-000001.json``, ``reader-000001.json``; the highest number is the claim that counts.

A claim is taken by hard-linking a finished file to its name, which fails if the name is there: one winner, also over
NFS. Heartbeats replace the file of their own epoch, so a process that was fenced can never touch its successor's.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path

import msgspec

from disagg_core.channel.contract import ClaimStatus, Side
from disagg_core.channel.file.filesystem import FileSystem
from disagg_core.channel.records import BadFrame, frame, unframe

_NAME = re.compile(r"^(writer|reader)-(\d+)\.json$")
_decoder = msgspec.json.Decoder(ClaimStatus)


class FileClaims:
    """The claims of one channel directory."""

    def __init__(self, directory: Path, files: FileSystem) -> None:
        self._directory = directory
        self._files = files
        self._seen = False

    def newest(self, side: Side) -> int:
        """Return the epoch of the newest claim of a side; 0 if there is none.

        Raises:
            FileNotFoundError: there are none at all, as there were before: the directory is away, and not empty.
        """
        names = self._files.names(self._directory) if self._directory.is_dir() else []
        claims = [match for match in map(_NAME.match, names) if match]
        if self._seen and not claims:
            raise FileNotFoundError(errno.ENOENT, "the channel is not there any more", str(self._directory))
        self._seen = bool(claims)
        return max((int(match[2]) for match in claims if match[1] == side), default=0)

    def is_newest(self, side: Side, epoch: int) -> bool:
        """Return whether no claim came after `epoch`, looking at two names only: it is asked for each batch.

        A later claim is either the next one, or came after the next one had removed ours.
        """
        if self._path(side, epoch + 1).exists():
            return False
        return self._path(side, epoch).exists() or self.newest(side) == epoch

    def read_claim(self, side: Side) -> ClaimStatus | None:
        """Return the newest claim of a side; an unreadable one reads as held by an unknown process."""
        while epoch := self.newest(side):
            try:
                data = self._path(side, epoch).read_bytes()
            except FileNotFoundError:  # superseded between listing and reading
                continue
            try:
                return _decoder.decode(unframe(data.removesuffix(b"\n")))
            except (BadFrame, msgspec.MsgspecError):
                return _unknown(epoch)
        return None

    def swap_claim(self, side: Side, status: ClaimStatus) -> bool:
        """Take the claim number ``status.epoch``; return False if somebody else has it, or a later one."""
        self._directory.mkdir(parents=True, exist_ok=True)
        draft = self._draft(side, status)
        self._files.write_file(draft, frame(status), durable=True)
        try:
            self._files.link(draft, self._path(side, status.epoch))
        except FileExistsError:
            return False
        finally:
            self._files.unlink(draft)
        if self.newest(side) > status.epoch:  # our number was free only because a later claim had removed it
            self._files.unlink(self._path(side, status.epoch))
            return False
        self._files.sync_directory(self._directory)
        self._remove_older(side, status.epoch)
        return True

    def beat(self, side: Side, status: ClaimStatus) -> bool:
        """Replace the claim ``status.epoch``; return False if there is a newer one."""
        if self.newest(side) > status.epoch:
            return False
        draft = self._draft(side, status)
        self._files.write_file(draft, frame(status), durable=False)
        self._files.replace(draft, self._path(side, status.epoch))
        return True

    def _remove_older(self, side: Side, epoch: int) -> None:
        for name in self._files.names(self._directory):
            match = _NAME.match(name)
            if (match and match[1] == side and int(match[2]) < epoch) or name.startswith(f".{side}-"):
                self._files.unlink(self._directory / name)

    def _path(self, side: Side, epoch: int) -> Path:
        return self._directory / f"{side}-{epoch:06d}.json"

    def _draft(self, side: Side, status: ClaimStatus) -> Path:
        return self._directory / f".{side}-{status.epoch:06d}-{status.token[:8]}.tmp"


def _unknown(epoch: int) -> ClaimStatus:
    return ClaimStatus(
        run_id="", attempt=0, epoch=epoch, host="unknown", boot="", pid_space="", pid=0, started=0, token=""
    )
