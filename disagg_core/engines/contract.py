"""What a target is to the producer: the one seam between the drive loop and whatever runs the frozen model.

Two kinds of targets fit behind it. One runs the model in this process and hands tensors over (`Captured`); the worker
puts them into the feature store. The other drives servers whose own process writes the sample into the store; its
reply carries the finished reference only (`Stored`). The drive loop does not ask which of the two it has: both end
as a `SampleRef` that a consumer cannot tell apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from disagg_core.contracts import Capture, PromptTask, RunIdentity, SampleRef
from disagg_core.store.outgoing import Shapes
from disagg_core.store.packing import DTYPES


@dataclass(frozen=True)
class Captured:
    """A sample whose tensors are in this process.

    `tensors` are those of `Capture.features` for all tokens (prompt, and continuation when the target generates), on
    the CPU and owned by the receiver. `generate_s`, `capture_s` and `copy_s` are this sample's share of the decoding of
    its continuation, of the forward pass and of the copy to the CPU, in seconds.
    """

    task: PromptTask
    tensors: Mapping[str, Tensor]
    num_tokens: int
    server: str = "local"
    generate_s: float = 0.0
    capture_s: float = 0.0
    copy_s: float = 0.0


@dataclass(frozen=True)
class Stored:
    """A sample that a server has written into the feature store: finished, readable, not yet published.

    `ref` must equal, in all but key and metadata, what `MooncakeFeatureStore.put` would have returned for the same
    tensors: sample id of the task, identity as given to `Target.prepare`, same tensor names, dtypes and packing.
    """

    task: PromptTask
    ref: SampleRef
    server: str
    generate_s: float = 0.0
    capture_s: float = 0.0
    copy_s: float = 0.0
    put_s: float = 0.0


@dataclass(frozen=True)
class Generated:
    """A continuation of a prompt, without the prompt and without padding; its last token may be an end-of-text id.

    `seconds` is its share of the decoding, 0 where it was known already.
    """

    task: PromptTask
    tokens: list[int]
    server: str = "local"
    seconds: float = 0.0


@dataclass(frozen=True)
class Failed:
    """A task that came to nothing on `server`, and why.

    `retryable` False: the sample itself is unusable wherever it is tried (too long for the model, no live position
    after generation, rows that do not match tokens); it is rejected at once with `reason`. True: it is leased again,
    on another server where there is one, until `max_prompt_attempts`; then it is quarantined with `reason`.
    `own_form`: the prompt's own form is why, as a look at it shows, and no doing of the target's.
    Something that was stored for the task before it failed has been removed again.
    """

    task: PromptTask
    reason: str
    retryable: bool
    server: str = "local"
    own_form: bool = False


CaptureOutcome: TypeAlias = Captured | Stored | Failed


@dataclass
class ServerHealth:
    """What became of one server, for metrics and the run's report. A local target has one, named ``local``.

    `worked` grows with whatever it does: decoding steps, batches, answers. It says only that the server gets on.
    """

    name: str
    state: str = "closed"
    captured: int = 0
    failures: int = 0
    restarts: int = 0
    queue_depth: int = 0
    worked: int = 0
    events: list[str] = field(default_factory=list)


def shapes_of(capture: Capture, tokens: int, hidden_size: int, dtype: torch.dtype) -> Shapes:
    """Return `Capture.features` of a sample with torch's dtypes, as the store allocates them."""
    features = capture.features(tokens, hidden_size, str(dtype).removeprefix("torch."))
    return {name: (shape, DTYPES[kind]) for name, (shape, kind) in features.items()}


def is_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Tell whether the states of a sample are finite: a value that is not makes all later layers' not finite too."""
    return bool(all_finite(tensors.get("last_hidden_state", tensors["aux_hidden_states"])))


def all_finite(states: Tensor) -> Tensor:
    """Return whether all of `states` are finite, a bool scalar on their device."""
    return states.sum(dtype=torch.float32).isfinite()


class Target(Protocol):
    """The frozen model, wherever it runs. This protocol is the whole of that surface.

    Life: constructed (cheap: nothing is started or loaded), `prepare` once, then `capture` and `generate` from up to
    `concurrency` threads at the same time, then `close` (also after a failed `prepare`; more than once does nothing).

    `batch_size` is the number of tasks of one call that makes good use of the engine. Where it is above 1 the numbers
    of a sample may depend, in the last bits, on which tasks it is batched with. The producer therefore always hands in
    the same group of tasks - ordinals ``[k * batch_size, (k + 1) * batch_size)`` of the seeded order, also the ones
    that a resumed run has already trained - and the target must make its padded batches a function of the given tasks
    alone: that is what makes a resumed run bitwise the same. A target with `batch_size` 1 batches by itself (or its
    server does) and promises no such thing.

    `concurrency` is the number of calls that the target wants in flight; it is constant after `prepare`.
    """

    batch_size: int
    concurrency: int

    def prepare(self, identity: RunIdentity) -> None:
        """Load or start the model and prove that it is the one of `identity` and captures its states in its dtype.

        Every server is checked before the first sample; `identity` is what references written by a server carry.
        Called again on a prepared target it replaces the identity and starts nothing: the vocabulary map, whose hash is
        part of it, may have to be counted over continuations of this very target first.

        Raises:
            TargetError: a server has another model, revision, tokenizer, version or set of layers than expected,
                or cannot capture; the message names the server, what was expected and what was found.
            TargetUnavailable: nothing could be reached or started within the allowed time.
        """
        ...

    def capture(self, tasks: Sequence[PromptTask], *, avoid: Mapping[int, frozenset[str]]) -> Iterator[CaptureOutcome]:
        """Yield exactly one outcome for each task, in any order, each as soon as it is there.

        With generation switched on, the continuation is generated first (seeded by the run's seed and the task's
        ordinal, so that it is the same in every attempt) unless the task has it already; its tokens get loss mask 1,
        and prompt plus continuation are captured. `avoid` maps an ordinal to the servers on which that task has failed
        already: they are used for it only when no other is left.

        A failure that concerns tasks is an outcome, never an exception. The caller may stop iterating early; what was
        stored but not yielded is then removed by the target.

        Raises:
            TargetUnavailable: no server is usable at present. None of the tasks without an outcome was attempted;
                they keep their number of attempts.
            TargetBroken: a target in this process is no longer able to capture; no task is blamed for it.
        """
        ...

    def generate(
        self, tasks: Sequence[PromptTask], *, avoid: Mapping[int, frozenset[str]]
    ) -> Iterator[Generated | Failed]:
        """Yield the continuation of each task as `capture` would generate it, without capturing anything.

        Raises:
            TargetUnavailable: as for `capture`.
        """
        ...

    def health(self) -> list[ServerHealth]:
        """Return the present state of every server; safe to call from any thread at any time."""
        ...

    def close(self) -> None:
        """Stop what was started and free what was loaded."""
        ...
