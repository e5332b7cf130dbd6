"""The target run by servers of any engine, which write the samples themselves; only references come back."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from disagg_core.contracts import Capture, PromptTask, RunIdentity, SampleRef
from disagg_core.engines.contract import CaptureOutcome, Failed, Generated, ServerHealth, Stored
from disagg_core.engines.generation import Sampling, Untrainable, any_sample
from disagg_core.engines.servers.contract import (
    PromptRefused,
    ServerBusy,
    ServerClient,
    ServerFailure,
    ServerUnreachable,
)
from disagg_core.engines.servers.pool import PoolMember, ServerPool
from disagg_core.engines.servers.probe import Reference, check_probe, probe_ids, reference_states
from disagg_core.engines.servers.wire import CaptureOrder, StoreAddress, spans_of
from disagg_core.errors import TargetError, TargetUnavailable
from disagg_core.run_spec.document import GenerateSection, StoreSection, TargetSection
from disagg_core.settings import Settings
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.target.facts import TargetFacts, model_fingerprint

logger = logging.getLogger(__name__)

_REPLY_MARGIN_S = 5.0
_SETTLE_TIMEOUT_S = 10.0


class SweepableStore(Protocol):
    """What the target needs of the feature store: where it is, and how to take back what a server left there.

    `staging_bytes` is the transfer memory of one direction that a client of it takes.
    """

    endpoints: StoreEndpoints
    namespace: str
    staging_bytes: int

    def abort(self, ref: SampleRef) -> None:
        """Remove one sample."""
        ...

    def sweep(self, prefix: str | None = None) -> int:
        """Remove every sample under `prefix`."""
        ...


class ServedTarget(ABC):
    """A `disagg_core.engines.contract.Target` over one or more servers, ours or external ones.

    An engine adds how its servers are reached and started, and how they are told to sample.

    Args:
        section: the run's target; `server_urls` name external servers, otherwise `servers` are started here.
        facts: what is known of the model.
        capture: which states the samples hold.
        store: the attempt's store; the servers write into its namespace.
        store_section: protocol and checksum of the samples, for the servers.
        max_tokens: longest sample, prompt and continuation together.
        log_dir: where the log files of our servers go.
        settings: the machine's settings: the engine's environment and the address to bind to.
        generate: how to continue prompts before they are captured; None captures them as they are.
        seed: the run's seed.
        health_timeout_s: a suspected server that does not answer its health check for so long hangs.
        while_waiting: called twice a second while the servers start, which can take minutes; what it raises ends that.
    """

    batch_size = 1

    def __init__(
        self,
        section: TargetSection,
        facts: TargetFacts,
        capture: Capture,
        *,
        store: SweepableStore,
        store_section: StoreSection,
        max_tokens: int,
        log_dir: Path,
        settings: Settings,
        generate: GenerateSection | None = None,
        seed: int = 0,
        untrainable: Untrainable = any_sample,
        health_timeout_s: float = 20.0,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self._section = section
        self._facts = facts
        self._wanted = capture
        self._store = store
        self._address = StoreAddress(
            master_address=store.endpoints.master_address,
            metrics_address=store.endpoints.metrics_address,
            namespace=store.namespace,
            protocol=store_section.protocol,
            checksum=store_section.checksum,
            put_timeout_s=min(store_section.put_timeout_s, section.request_timeout_s / 2),
            staging_bytes=store.staging_bytes,
        )
        self._max_tokens = max_tokens
        self._log_dir = log_dir
        self._settings = settings
        self._sampling = None
        if generate is not None:
            self._sampling = Sampling.of(generate, max_tokens=max_tokens, seed=seed, untrainable=untrainable)
        self._seed = seed
        self._health_timeout_s = health_timeout_s
        self._while_waiting = while_waiting
        self._fingerprint = model_fingerprint(facts.model, section.revision)
        self._identity: RunIdentity | None = None
        self._pool: ServerPool | None = None
        self._reference: Reference | None = None
        self._reference_lock = threading.Lock()
        servers = len(section.server_urls) or section.servers
        self.concurrency = servers * section.server_concurrency
        self._threads = ThreadPoolExecutor(self.concurrency, thread_name_prefix="server-request")
        self._closed = False

    def prepare(self, identity: RunIdentity) -> None:
        """See `Target.prepare`. A prepared target only takes the new identity.

        Raises:
            TargetError: a server is not the run's target or cannot capture; all such servers are named.
            TargetUnavailable: no server could be started or reached.
            MissingLibrary: servers are to be started, and the engine's environment is not there.
        """
        if identity.capture != self._wanted:
            raise TargetError(f"target {self._facts.model}: expected {identity.capture}, found {self._wanted}")
        if self._pool is None:
            self._pool = ServerPool(
                self._members(),
                concurrency=self._section.server_concurrency,
                check=self._check,
                start_timeout_s=self._section.unavailable_timeout_s,
                place_timeout_s=self._section.request_timeout_s,
                health_timeout_s=self._health_timeout_s,
            )
            self._pool.start(while_waiting=self._while_waiting)
        self._identity = identity

    def capture(self, tasks: Sequence[PromptTask], *, avoid: Mapping[int, frozenset[str]]) -> Iterator[CaptureOutcome]:
        """See `Target.capture`; the outcomes are `Stored` and `Failed`."""
        return self._spread(tasks, avoid, self._capture, self._take_back)

    def generate(
        self, tasks: Sequence[PromptTask], *, avoid: Mapping[int, frozenset[str]]
    ) -> Iterator[Generated | Failed]:
        """See `Target.generate`."""
        return self._spread(tasks, avoid, self._continue, lambda _outcome: None)

    def health(self) -> list[ServerHealth]:
        """Return the state of every server; empty before `prepare`."""
        return [] if self._pool is None else self._pool.health()

    def close(self) -> None:
        """Stop our servers and end what is in flight; what is stored but was not yielded is removed."""
        if self._closed:
            return
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._pool is not None:
            self._pool.close()

    # --- servers --------------------------------------------------------------------------------------------------

    @abstractmethod
    def _members(self) -> list[PoolMember]:
        """Return the servers, ours or external ones; none is started yet.

        Raises:
            MissingLibrary: servers are to be started, and the engine's environment is not there.
        """

    @abstractmethod
    def _sampling_parameters(self, task: PromptTask, sampling: Sampling) -> dict[str, Any]:
        """Return how the engine is told to continue `task`."""

    def _check(self, client: ServerClient) -> None:
        reply = client.probe(probe_ids(self._facts))
        with self._reference_lock:
            if self._reference is None:
                self._reference = reference_states(self._section, self._facts, self._wanted)
        compared = check_probe(
            client.name, reply, self._section, self._facts, self._wanted, self._reference, max_tokens=self._max_tokens
        )
        for entry in compared:
            logger.info("%s: %s differs from transformers by %.3g", client.name, entry.name, entry.relative)

    # --- tasks ----------------------------------------------------------------------------------------------------

    def _spread(
        self,
        tasks: Sequence[PromptTask],
        avoid: Mapping[int, frozenset[str]],
        work: Callable[[ServerClient, PromptTask], _Outcome],
        drop: Callable[[_Outcome], None],
    ) -> Iterator[_Outcome]:
        """Run `work` for every task at once and yield the outcomes as they come; `drop` those nobody takes."""
        pool = self._prepared()

        def run(task: PromptTask) -> _Outcome:
            avoided = avoid.get(task.ordinal, frozenset())
            began = time.monotonic()
            while True:  # a server that cannot be reached is soon out, and with the last one acquire() raises
                client = pool.acquire(avoided)
                try:
                    return work(client, task)
                except ServerBusy as error:  # it is paused; another one, or the same later, takes the task
                    if time.monotonic() - began > self._section.request_timeout_s:
                        raise TargetUnavailable(f"the servers are busy: {error}") from error
                except ServerUnreachable:
                    avoided |= {client.name}

        if len(tasks) == 1:
            yield run(tasks[0])
            return
        pending: set[Future[_Outcome]] = {self._threads.submit(run, task) for task in tasks}
        unavailable: TargetUnavailable | None = None
        try:
            for future in as_completed(list(pending)):
                pending.discard(future)
                try:
                    outcome = future.result()
                except TargetUnavailable as error:
                    unavailable = error
                    continue
                yield outcome
        finally:
            for future in pending:
                if not future.cancel():
                    future.add_done_callback(lambda done: None if done.exception() else drop(done.result()))
            wait(pending, timeout=_SETTLE_TIMEOUT_S if self._closed else None)
        if unavailable is not None:
            raise unavailable

    def _prepared(self) -> ServerPool:
        if self._pool is None or self._identity is None:
            raise TargetError("the target was used before prepare()")
        return self._pool

    def _capture(self, client: ServerClient, task: PromptTask) -> Stored | Failed:
        def work() -> Stored | Failed:
            input_ids, loss_mask = task.input_ids, task.loss_mask
            began = time.perf_counter()
            if self._sampling is not None:
                tokens = self._continuation(client, task, self._sampling)
                input_ids, loss_mask = input_ids + tokens, [0] * len(input_ids) + [1] * len(tokens)
            generated = time.perf_counter()
            return replace(self._store_sample(client, task, input_ids, loss_mask), generate_s=generated - began)

        return self._attempt(client, task, work)

    def _continue(self, client: ServerClient, task: PromptTask) -> Generated | Failed:
        sampling = self._sampling
        if sampling is None:
            raise ValueError("this target was made without sampling; give it the run's data.generate section")
        return self._attempt(
            client, task, lambda: Generated(task, self._continuation(client, task, sampling), client.name)
        )

    def _attempt(self, client: ServerClient, task: PromptTask, work: Callable[[], _Outcome]) -> _Outcome | Failed:
        """Run `work` on the place that was taken on `client`, and say whose failure a failure is.

        Raises:
            ServerUnreachable: the task was not tried, and keeps its number of attempts.
            ServerBusy: so it does where the server could not keep up.
        """
        pool = self._prepared()
        try:
            self._check_task(task)
            outcome = work()
        except PromptRefused as refused:
            pool.succeeded(client.name, captured=False)
            return Failed(
                task, str(refused), retryable=refused.retryable, server=client.name, own_form=refused.own_form
            )
        except ServerBusy as error:
            pool.busy(client.name, str(error))
            raise
        except ServerUnreachable as error:
            pool.failed(client.name, str(error))
            raise
        except (ServerFailure, TargetError) as error:
            pool.failed(client.name, str(error))
            # Whether the server wrote the sample before it broke is not known; nobody else holds this task now.
            # Where it is the store that is gone, this raises: the run ends as store_lost, no prompt is blamed.
            self._store.sweep(f"{self._store.namespace}/{task.sample_id}")
            return Failed(task, str(error), retryable=True, server=client.name)
        except BaseException:
            pool.failed(client.name, "the request was broken off here")
            raise
        pool.succeeded(client.name, captured=isinstance(outcome, Stored))
        return outcome

    def _check_task(self, task: PromptTask) -> None:
        """Refuse what SGLang does not look at itself: a token id that the model does not have kills the server."""
        highest, lowest = max(task.input_ids, default=-1), min(task.input_ids, default=-1)
        if not 0 <= lowest <= highest < self._facts.vocab_size:
            wrong = highest if lowest >= 0 else lowest
            raise PromptRefused(
                f"token id {wrong} is not of the target, whose vocabulary has {self._facts.vocab_size}",
                retryable=False,
                own_form=True,
            )
        if self._sampling is not None and self._sampling.room(task) < 1:
            full = f"no room for a continuation after {len(task.input_ids)} tokens"
            raise PromptRefused(full, retryable=False, own_form=True)

    def _continuation(self, client: ServerClient, task: PromptTask, sampling: Sampling) -> list[int]:
        tokens = task.continuation
        if tokens is None:
            tokens = client.generate(task.input_ids, self._sampling_parameters(task, sampling))
        if len(tokens) > sampling.room(task) or not all(0 <= token < self._facts.vocab_size for token in tokens):
            raise ServerFailure(
                f"expected at most {sampling.room(task)} token ids of {self._facts.vocab_size} from {client.name}, "
                f"found {len(tokens)} from {min(tokens)} to {max(tokens)}"
            )
        if (reason := sampling.refused(task, tokens)) is not None:
            raise PromptRefused(reason, retryable=False, own_form=True)
        return tokens

    def _store_sample(
        self, client: ServerClient, task: PromptTask, input_ids: list[int], loss_mask: list[int]
    ) -> Stored:
        assert self._identity is not None
        timeout_s = self._section.request_timeout_s
        order = CaptureOrder(
            sample_id=task.sample_id,
            source_task_id=task.source,
            server=client.name,
            fingerprint=self._fingerprint,
            num_tokens=len(input_ids),
            loss_spans=spans_of(loss_mask),
            identity=self._identity,
            store=self._address,
            deadline=client.server_time(timeout_s - min(_REPLY_MARGIN_S, timeout_s / 4)),
        )
        began = time.perf_counter()
        reply = client.capture(input_ids, order)
        spent = time.perf_counter() - began
        return Stored(
            task,
            reply.ref,
            client.name,
            capture_s=max(0.0, spent - reply.copy_s - reply.put_s),
            copy_s=reply.copy_s,
            put_s=reply.put_s,
        )

    def _take_back(self, outcome: CaptureOutcome) -> None:
        if isinstance(outcome, Stored):
            self._store.abort(outcome.ref)


_Outcome = TypeVar("_Outcome")
