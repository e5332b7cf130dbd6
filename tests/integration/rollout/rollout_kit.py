"""A target that fails on command, and a consumer that acknowledges whole windows, for tests of the drive loop."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from disagg_core.channel import StreamingRefChannel, StreamingRefQueue
from disagg_core.contracts import PromptTask, SampleRef, StreamTotals
from disagg_core.engines.contract import Captured, Failed, ServerHealth
from disagg_core.run.plan import RoleAssignment
from disagg_core.store import MooncakeFeatureStore
from tests.kit.waiting import PATIENCE_S

Script = Callable[[PromptTask, int], str | None]


class ScriptedTarget:
    """Captures tensors of the right shape; `script` may give a reason to fail for a task and its how-manieth try.

    A reason that begins with ``never`` is final. `before` is called with each batch and may raise or wait.
    """

    def __init__(
        self,
        script: Script = lambda task, tries: None,
        *,
        batch_size: int = 1,
        concurrency: int = 1,
        before: Callable[[list[PromptTask]], None] = lambda tasks: None,
    ) -> None:
        self.batch_size = batch_size
        self.concurrency = concurrency
        self._script = script
        self._before = before
        self._lock = threading.Lock()
        self.tries: Counter[int] = Counter()
        self.batches: list[list[int]] = []

    def prepare(self, identity) -> None:
        pass

    def capture(self, tasks, *, avoid):
        with self._lock:
            self.batches.append([task.ordinal for task in tasks])
        self._before(list(tasks))
        for task in tasks:
            with self._lock:
                self.tries[task.ordinal] += 1
            reason = self._script(task, self.tries[task.ordinal])
            if reason is not None:
                yield Failed(task, reason, retryable=not reason.startswith("never"))
                continue
            rows = len(task.input_ids)
            tensors = {
                "input_ids": torch.tensor(task.input_ids, dtype=torch.int32),
                "loss_mask": torch.tensor(task.loss_mask, dtype=torch.uint8),
                "aux_hidden_states": torch.full((rows, 12), float(task.ordinal)),
                "last_hidden_state": torch.full((rows, 4), float(task.ordinal)),
            }
            yield Captured(task, tensors, rows)

    def generate(self, tasks, *, avoid):
        raise NotImplementedError

    def health(self) -> list[ServerHealth]:
        return [ServerHealth("scripted")]

    def close(self) -> None:
        pass


class Consumer:
    """Reads windows from a channel on its own thread, frees and acknowledges them, until the end or `stop_after`."""

    def __init__(
        self,
        channel: StreamingRefChannel,
        store: MooncakeFeatureStore,
        *,
        window: int = 1,
        stop_after: int | None = None,
        how: Callable[[StreamingRefChannel], None] = lambda channel: channel.finish("max_steps"),
        before_ack: Callable[[], None] = lambda: None,
    ) -> None:
        self._channel = channel
        self._queue = StreamingRefQueue(channel)
        self._store = store
        self._window = window
        self._stop_after = stop_after
        self._how = how
        self._before_ack = before_ack
        self.ordinals: list[str] = []
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Consumer:
        self._channel.claim_reader()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the consumer never came to an end"

    def _run(self) -> None:
        try:
            while refs := self._queue.get(self._window):
                self._before_ack()
                self.ordinals += [int(ref.sample_id[1:]) for ref in refs]
                for ref in refs:
                    self._store.release(ref)
                self._queue.ack(refs)
                if self._stop_after is not None and len(self.ordinals) >= self._stop_after:
                    self._how(self._channel)
                    return
        except BaseException as error:  # noqa: BLE001 - looked at by the test
            self.error = error


def tasks_of(count: int, tokens: int = 8) -> list[PromptTask]:
    return [
        PromptTask(ordinal=n, source=f"test:{n}", input_ids=[n % 50] * tokens, loss_mask=[1] * tokens)
        for n in range(count)
    ]


def write_prompts(path: Path, count: int) -> Path:
    """Write `count` short conversations of different lengths."""
    lines = [
        json.dumps(
            {
                "messages": [
                    {"role": "user", "content": f"question {number}?"},
                    {"role": "assistant", "content": "so it is " * (1 + number % 4) + str(number)},
                ]
            }
        )
        for number in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def read_all(assignment: RoleAssignment) -> tuple[list[SampleRef], StreamTotals | None]:
    """Return every reference of an assignment's stream, and its totals."""
    with StreamingRefChannel(assignment.channel_url, run_id=assignment.plan.run_id, attempt=assignment.attempt) as ch:
        return list(ch.stream()), ch.totals


def tensors_of(assignment: RoleAssignment, refs: list[SampleRef]) -> list[dict[str, torch.Tensor]]:
    with MooncakeFeatureStore(assignment.store, namespace=assignment.namespace) as store:
        return [store.get(ref) for ref in refs]
