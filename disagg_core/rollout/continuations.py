"""Continuations that the target has generated, kept in the run's directory: a prompt is continued once in a run.

The file's first line says what the continuations were made from; each further line holds those of one call, so that a
group of prompts that were decoded together is there whole or not at all. A last line that a killed process left torn is
cut off, and its group is continued again; a damaged line in between is passed over.

A greedy continuation is a function of the prompt's tokens, and is found by them: also in the next epoch. A sampled one
is a function of the seed and of the prompt's place, and is found by that.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock

import msgspec

from disagg_core.contracts import PromptTask, RunIdentity
from disagg_core.engines.contract import CaptureOutcome, Failed, Generated, ServerHealth, Target
from disagg_core.files import LineFile
from disagg_core.run.plan import RunPlan

log = logging.getLogger(__name__)


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first line: a hash of what the continuations depend on, and whether they were drawn."""

    origin: str
    sampled: bool

    @classmethod
    def of(cls, plan: RunPlan) -> Origin:
        """Return the origin of the continuations of a run with `data.generate`."""
        data = plan.spec.data
        assert data.generate is not None
        sampled = data.generate.temperature > 0
        parts = [plan.target.version, plan.tokenizer_version, data.generate.model_dump_json(), str(data.max_tokens)]
        if sampled:  # which prompt stands at which place
            pinned = "" if plan.data is None else plan.data.model_dump_json()
            parts += [str(plan.spec.run.seed), data.model_dump_json(), pinned]
        return cls(origin=hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16], sampled=sampled)


class _Kept(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line: the continuations of one call by their keys, and the CRC-32 of all tokens."""

    keys: list[int]
    tokens: list[list[int]]
    crc: int

    @property
    def whole(self) -> bool:
        return len(self.keys) == len(self.tokens) and self.crc == _crc(self.keys, self.tokens)


class ContinuationLog:
    """The continuations of one run: appended by one process, looked up by any of its threads.

    A file that was made from something else is not used, and begun anew. In memory is only where each one stands.
    """

    def __init__(self, path: Path, origin: Origin) -> None:
        self._path = path
        self._sampled = origin.sampled
        self._lock = Lock()
        self._places: dict[int, tuple[int, int]] = {}  # key -> offset and length of its line
        self._line: tuple[int, dict[int, list[int]]] = (-1, {})  # the line that was read last, by its offset
        known = _origin_in(path)
        if known not in (None, origin):
            log.warning("%s holds continuations of other prompts, target or sampling; it is begun anew", path)
        if known != origin:
            path.unlink(missing_ok=True)
        self._file = LineFile(path)
        if known != origin:
            self._file.append(msgspec.json.encode(origin))
        self._end = path.stat().st_size
        self._read = path.open("rb")
        self._index()

    def __len__(self) -> int:
        return len(self._places)

    def find(self, task: PromptTask) -> list[int] | None:
        """Return the continuation of `task` without its prompt, None if it is not known."""
        key = self.key(task)
        with self._lock:
            place = self._places.get(key)
            if place is None:
                return None
            if self._line[0] != place[0]:
                self._read.seek(place[0])
                kept = msgspec.json.decode(self._read.read(place[1]), type=_Kept)
                self._line = (place[0], dict(zip(kept.keys, kept.tokens, strict=True)))
            return self._line[1][key]

    def keep(self, outcomes: Sequence[Generated]) -> None:
        """Append the continuations of one call, those that are not known yet.

        Raises:
            OSError: they cannot be written; none of them is known then.
        """
        with self._lock:
            new = {self.key(outcome.task): outcome.tokens for outcome in outcomes}
            new = {key: tokens for key, tokens in new.items() if key not in self._places}
            if not new:
                return
            keys, tokens = list(new), list(new.values())
            line = msgspec.json.encode(_Kept(keys=keys, tokens=tokens, crc=_crc(keys, tokens)))
            self._file.append(line)
            self._places |= dict.fromkeys(keys, (self._end, len(line)))
            self._end += len(line) + 1

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._read.close()

    def key(self, task: PromptTask) -> int:
        """Return what a continuation of `task` is found by: tasks of one key have the same continuation."""
        if self._sampled:
            return task.ordinal
        tokens = b"".join(token.to_bytes(4, "little") for token in task.input_ids)
        return int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest(), "little")

    def _index(self) -> None:
        offset = 0
        for number, line in enumerate(self._read, start=1):
            if number > 1 and (kept := _decoded(line, f"{self._path}, line {number}")) is not None:
                self._places |= dict.fromkeys(kept.keys, (offset, len(line) - 1))
            offset += len(line)


def _crc(keys: Sequence[int], tokens: Sequence[Sequence[int]]) -> int:
    return zlib.crc32(msgspec.json.encode([keys, tokens]))


def _origin_in(path: Path) -> Origin | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        line = file.readline()
    try:
        return msgspec.json.decode(line, type=Origin)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Origin(origin="damaged", sampled=False)


def _decoded(line: bytes, where: str) -> _Kept | None:
    try:
        kept = msgspec.json.decode(line, type=_Kept)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        log.warning("%s cannot be read and is passed over: %s", where, error)
        return None
    if not kept.whole:
        log.warning("%s is passed over: its tokens are not those of its checksum", where)
        return None
    return kept


class ContinuedTarget:
    """A `Target` that continues each prompt once: what `kept` knows is captured, and not generated again."""

    def __init__(self, target: Target, kept: ContinuationLog) -> None:
        self.batch_size = target.batch_size
        self.concurrency = target.concurrency
        self._target = target
        self._kept = kept

    def prepare(self, identity: RunIdentity) -> None:
        """See `Target.prepare`."""
        self._target.prepare(identity)

    def generate(
        self, tasks: Sequence[PromptTask], *, avoid: Mapping[int, frozenset[str]]
    ) -> Iterator[Generated | Failed]:
        """Yield what is known, then what the target makes of the rest, kept from then on; see `Target.generate`.

        A target that decodes a group together has it kept together, so that what is continued after a restart is
        decoded in the company that it would have had.
        """
        same: dict[int, list[PromptTask]] = {}
        for task in tasks:
            if (tokens := self._kept.find(task)) is None:
                same.setdefault(self._kept.key(task), []).append(task)
            else:
                yield Generated(task, tokens)
        outcomes = self._target.generate([first for first, *_ in same.values()], avoid=avoid) if same else iter(())
        for outcome in self._remembered(outcomes):
            for task in same[self._kept.key(outcome.task)]:
                yield replace(outcome, task=task)
                if isinstance(outcome, Generated):
                    outcome = replace(outcome, seconds=0.0)  # it was decoded once

    def _remembered(self, outcomes: Iterator[Generated | Failed]) -> Iterator[Generated | Failed]:
        if self.batch_size == 1:
            for outcome in outcomes:
                self._kept.keep([outcome] if isinstance(outcome, Generated) else [])
                yield outcome
            return
        together = list(outcomes)
        self._kept.keep([outcome for outcome in together if isinstance(outcome, Generated)])
        yield from together

    def capture(self, tasks: Sequence[PromptTask], *, avoid: Mapping[int, frozenset[str]]) -> Iterator[CaptureOutcome]:
        """Continue the tasks, then capture them with their continuations; see `Target.capture`."""
        originals = {task.ordinal: task for task in tasks}
        continued: list[PromptTask] = []
        spent: dict[int, float] = {}
        for outcome in self.generate(tasks, avoid=avoid):
            if isinstance(outcome, Failed):
                yield outcome
            else:
                continued.append(msgspec.structs.replace(outcome.task, continuation=outcome.tokens))
                spent[outcome.task.ordinal] = outcome.seconds
        if not continued:
            return
        for captured in self._target.capture(continued, avoid=avoid):
            ordinal = captured.task.ordinal
            if isinstance(captured, Failed):
                yield replace(captured, task=originals[ordinal])
            else:
                seconds = captured.generate_s + spent[ordinal]
                yield replace(captured, task=originals[ordinal], generate_s=seconds)

    def health(self) -> list[ServerHealth]:
        """See `Target.health`."""
        return self._target.health()

    def close(self) -> None:
        """Close the target; the file stays open."""
        self._target.close()
