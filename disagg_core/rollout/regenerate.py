"""Writing a data set of the target's own continuations, once, to be trained on as often as wanted.

Each line of the output is a pretokenised prompt (``input_ids`` with the continuation, ``loss_mask`` 1 on it), the
place the prompt came from, and the continuation as text for people. Beside it ``<out>.meta.json`` says what made it; an
interrupted file is continued only by the same target, tokenizer, prompts and sampling. A continuation is a function of
seed and prompt, so the finished file does not depend on interruptions.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from disagg_core.contracts import RunIdentity
from disagg_core.drafts.together import capture_of, strategy_of
from disagg_core.engines.contract import Generated, Target
from disagg_core.errors import BadInput, TargetUnavailable
from disagg_core.files import write_atomically
from disagg_core.ordinals import OrdinalSet
from disagg_core.prompts.files import file_hash
from disagg_core.prompts.record_files import open_records
from disagg_core.rollout.prompt_source import PromptBatch, PromptSource, Rejection
from disagg_core.run_spec.document import DataSection, RunSpec
from disagg_core.target.facts import TargetFacts
from disagg_core.target.tokenizer import load_tokenizer, version_in_use

log = logging.getLogger(__name__)

_PAUSE_S = 0.5


class Continuation(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the output."""

    ordinal: int
    source: str
    input_ids: list[int]
    loss_mask: list[int]
    text: str


@dataclass(frozen=True)
class Regenerated:
    """What a call of `regenerate` did: lines that were there before, lines written, prompts rejected."""

    before: int
    written: int
    rejected: int


def regenerate(
    spec: RunSpec,
    facts: TargetFacts,
    target: Target,
    out: Path,
    *,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> Regenerated:
    """Continue every prompt of `spec` that `out` does not hold yet; `progress` is told lines so far and in all.

    Raises:
        BadInput: the spec has no ``data.generate``, or `out` was made by something else.
        TargetError, TargetUnavailable: the target cannot be used.
    """
    if spec.data.generate is None:
        raise BadInput("regenerate needs a data.generate section: how long and how the target continues the prompts")
    tokenizer = load_tokenizer(spec.target)
    version = version_in_use(tokenizer, spec.data)
    _check_origin(out, _origin(spec, facts, version))
    known = _repair(out)
    rejections: list[Rejection] = []
    source = PromptSource.from_spec(
        spec,
        tokenizer,
        facts=facts,
        group=target.batch_size,
        skip=known,
        on_reject=rejections.append,
    )
    target.prepare(_identity(spec, facts, version))
    with out.open("ab", buffering=0) as file:
        writer = _ContinuationWriter(
            source, target, tokenizer, file, spec.target.unavailable_timeout_s, len(known), progress
        )
        writer.run(max(1, target.concurrency))
    source.close()
    for rejection in rejections:
        log.warning("%s: %s: %s", rejection.source, rejection.kind, rejection.reason)
    return Regenerated(before=len(known), written=writer.written, rejected=len(rejections))


def _origin(spec: RunSpec, facts: TargetFacts, tokenizer: str) -> dict[str, Any]:
    """Return what the continuations, and which prompt stands at which ordinal, depend on."""
    named = {"prompts", "format", "fields", "holdout", "max_tokens", "epochs", "shuffle", "limit", "generate"}
    prompts = Path(spec.data.prompts).expanduser()
    return {
        "target": facts.version,
        "tokenizer": tokenizer,
        "seed": spec.run.seed,
        "evaluation.prompts": spec.held_out_prompts,  # so many are held out
        **spec.data.model_dump(mode="json", include=named),
        "content": _content_hash(prompts, spec.data),
    }


def _content_hash(prompts: Path, data: DataSection) -> str | None:
    """Return a hash of the file or folder of prompts; None for a dataset that is streamed."""
    if prompts.is_file():
        return file_hash(prompts)
    if not prompts.is_dir():
        return None
    folder = open_records(prompts, data)
    folder.close()
    return folder.pin.sha256


def _check_origin(out: Path, origin: dict[str, Any]) -> None:
    meta = out.with_name(out.name + ".meta.json")
    if out.exists():
        known = msgspec.json.decode(meta.read_bytes()) if meta.is_file() else {}
        differing = [name for name in origin if known.get(name) != origin[name]]
        if differing:
            found = ", ".join(f"{name} {known.get(name)!r} (now {origin[name]!r})" for name in differing)
            raise BadInput(f"{out} was made with another {found}; choose another --out, or remove it")
    else:
        write_atomically(meta, msgspec.json.format(msgspec.json.encode(origin)))


def _repair(out: Path) -> OrdinalSet:
    """Cut off an unfinished last line and return the ordinals of the others."""
    known = OrdinalSet()
    if not out.is_file():
        return known
    whole = 0
    with out.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            known.add(msgspec.json.decode(line, type=Continuation).ordinal)
            whole += len(line)
    os.truncate(out, whole)
    return known


def _identity(spec: RunSpec, facts: TargetFacts, tokenizer: str) -> RunIdentity:
    return RunIdentity(
        run_id="regenerate",
        attempt=1,
        strategy=strategy_of(spec.all_drafts),
        target_model_version=facts.version,
        tokenizer_version=tokenizer,
        vocab_map_version="",
        draft_weight_version=0,
        capture=capture_of(spec.all_drafts, spec.target, facts),
        dtype=facts.dtype,
    )


class _ContinuationWriter:
    """Threads that lease prompts, have them continued, and append the lines."""

    def __init__(
        self,
        source: PromptSource,
        target: Target,
        tokenizer: Any,
        file: Any,
        unavailable_timeout_s: float,
        before: int,
        progress: Callable[[int, int | None], None],
    ) -> None:
        self._source = source
        self._target = target
        self._tokenizer = tokenizer
        self._file = file
        self._tries = max(1, int(unavailable_timeout_s / _PAUSE_S))
        self._before = before
        self._progress = progress
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self.written = 0

    def run(self, threads: int) -> None:
        """Work until every prompt is continued or rejected; raise what stopped a thread."""
        workers = [threading.Thread(target=self._work, args=(f"regenerate-{n}",), daemon=True) for n in range(threads)]
        for worker in workers:
            worker.start()
        with self._stopping():
            for worker in workers:
                while worker.is_alive():
                    worker.join(_PAUSE_S)
        if self._error is not None:
            raise self._error

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._stop.set()
            raise

    def _work(self, name: str) -> None:
        try:
            away = 0
            while not (self._stop.is_set() or self._source.drained):
                batch = self._source.lease(name)
                if batch is None:
                    self._stop.wait(_PAUSE_S / 10)
                    continue
                try:
                    self._continue(batch)
                    away = 0
                except TargetUnavailable:
                    away += 1
                    if away >= self._tries:
                        raise
                    self._stop.wait(_PAUSE_S)
        except BaseException as error:  # noqa: BLE001 - raised by `run`
            self._error = error
            self._stop.set()

    def _continue(self, batch: PromptBatch) -> None:
        leases = dict(batch.leases)
        lines: dict[int, bytes] = {}
        try:
            for outcome in self._target.generate(batch.tasks, avoid=batch.avoid):
                lease = leases.get(outcome.task.ordinal)
                if lease is None:
                    continue
                if isinstance(outcome, Generated):
                    lines[lease.ordinal] = self._line(outcome)
                    continue
                del leases[lease.ordinal]
                if outcome.retryable:
                    self._source.fail(lease, outcome.reason, outcome.server)
                else:
                    self._source.reject(lease, outcome.reason)
        finally:
            self._append(lines)
            for ordinal, lease in leases.items():
                if ordinal in lines:
                    self._source.complete(lease)
                else:
                    self._source.give_back(lease)

    def _line(self, outcome: Generated) -> bytes:
        task = outcome.task
        line = Continuation(
            ordinal=task.ordinal,
            source=task.source,
            input_ids=task.input_ids + outcome.tokens,
            loss_mask=[0] * len(task.input_ids) + [1] * len(outcome.tokens),
            text=self._tokenizer.decode(outcome.tokens),
        )
        return msgspec.json.encode(line) + b"\n"

    def _append(self, lines: dict[int, bytes]) -> None:
        with self._lock:
            self._file.write(b"".join(lines[ordinal] for ordinal in sorted(lines)))
            self.written += len(lines)
            self._progress(self._before + self.written, self._source.end)
