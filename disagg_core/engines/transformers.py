"""A target that runs in this process: any causal language model of transformers, on CPU, one GPU or several.

Hidden states are taken by `LayerStates`; the LM head is not run for a capture. Batches are padded on the right and need
no attention mask: attention is causal, so no real token sees the padding behind it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from disagg_core.contracts import Capture, PromptTask, RunIdentity
from disagg_core.engines.contract import (
    Captured,
    CaptureOutcome,
    Failed,
    Generated,
    ServerHealth,
    all_finite,
    shapes_of,
)
from disagg_core.engines.generation import Sampling, continue_tasks
from disagg_core.errors import TargetBroken, TargetError, classify
from disagg_core.run_spec.document import TargetSection
from disagg_core.store.outgoing import Allocate, allocate_plain
from disagg_core.target.facts import TargetFacts
from disagg_core.target.layers import LayerStates, find_decoder
from disagg_core.target.loading import load_target
from disagg_core.target.logits import check_logits

log = logging.getLogger(__name__)

_TOKENS_PER_PLACE = 64  # of shorter prompts a batch could hold more than a group, of longer ones a group is several
_LARGEST_GROUP = 64
_DECODE_FACTOR = 4  # a decoding step holds keys and values of its tokens only, and is the cheaper the wider it is


def group_for(batch_tokens: int) -> int:
    """Return how many prompts a group has that is captured with batches of `batch_tokens` padded tokens."""
    return min(_LARGEST_GROUP, max(1, batch_tokens // _TOKENS_PER_PLACE))


def decode_budget(batch_tokens: int) -> int:
    """Return how many tokens the cache of a decoded batch may hold, with captured batches of `batch_tokens`."""
    return _DECODE_FACTOR * batch_tokens


class TransformersTarget:
    """The `Target` that runs transformers itself. See `disagg_core.engines.contract` for the contract.

    `capture` says which states a sample holds; `sampling` switches generation on. `model` is a loaded causal LM to use
    instead of loading `section.model`. `allocate` makes the tensors that samples are handed over in; a store's own is
    for samples that it will be given.
    """

    concurrency = 1

    def __init__(
        self,
        section: TargetSection,
        facts: TargetFacts,
        capture: Capture,
        *,
        batch_tokens: int = 8192,
        sampling: Sampling | None = None,
        model: nn.Module | None = None,
        allocate: Allocate = allocate_plain,
    ) -> None:
        self.batch_size = group_for(batch_tokens)
        self._section = section
        self._facts = facts
        self._capture = capture
        self._batch_tokens = batch_tokens
        self._sampling = sampling
        self._allocate = allocate
        self._model: Any = model
        self._device = torch.device("cpu")
        self._states: LayerStates | None = None
        self._lock = threading.Lock()
        self._known_good: list[PromptTask] = []
        self._health = ServerHealth("local")

    # --- life ------------------------------------------------------------------------------------------------------

    def prepare(self, identity: RunIdentity) -> None:
        """Load the model and check it against `identity`; on a prepared target check the new identity only."""
        for name, expected, found in (
            ("model", identity.target_model_version, self._facts.version),
            ("states", identity.capture, self._capture),
            ("dtype", identity.dtype, self._facts.dtype),
        ):
            if expected != found:
                raise TargetError(f"target {self._facts.model}: expected {name} {expected}, found {found}")
        if self._states is not None:
            return
        model = load_target(self._section, self._facts) if self._model is None else self._model
        self._check_sizes(model)
        self._model = model.eval().requires_grad_(False)
        if self._capture.last_hidden_state:
            check_logits(self._model)
        self._states = LayerStates(model, self._capture)
        self._device = next(model.parameters()).device
        self._health.state = "closed"

    def _check_sizes(self, model: Any) -> None:
        expected = (self._facts.num_layers, self._facts.hidden_size)
        found = (len(find_decoder(model).layers), model.get_input_embeddings().weight.shape[1])
        if expected != found:
            raise TargetError(
                f"target {self._facts.model}: expected {expected[0]} layers of hidden size {expected[1]}, found "
                f"{found[0]} of {found[1]}; was it replaced after the run was planned?"
            )

    def close(self) -> None:
        """Remove the hooks and let the model go."""
        if self._states is not None:
            self._states.close()
        self._model = self._states = None

    def health(self) -> list[ServerHealth]:
        """Return the one entry of this process."""
        return [self._health]

    # --- capture ---------------------------------------------------------------------------------------------------

    def capture(self, tasks: Sequence[PromptTask], *, avoid: Mapping[int, frozenset[str]]) -> Iterator[CaptureOutcome]:
        """Yield one outcome for each task; see `Target.capture`."""
        usable: list[PromptTask] = []
        for task in tasks:
            reason = self._unusable(task)
            if reason is None:
                usable.append(task)
            else:
                yield Failed(task, reason, retryable=False, own_form=True)
        spent: dict[int, float] = {}
        if self._sampling is not None:
            continued: list[PromptTask] = []
            for outcome in self._generated(usable, self._sampling):
                if isinstance(outcome, Failed):
                    yield outcome
                elif (reason := self._sampling.refused(outcome.task, outcome.tokens)) is not None:
                    yield Failed(outcome.task, reason, retryable=False, own_form=True)
                else:
                    continued.append(_with_continuation(outcome))
                    spent[outcome.task.ordinal] = outcome.seconds
            usable = continued
        originals = {task.ordinal: task for task in tasks}
        for batch in token_batches(usable, self._batch_tokens):
            for result in self._captured(batch, originals):
                if isinstance(result, Captured):
                    self._health.captured += 1
                    yield replace(result, generate_s=spent.get(result.task.ordinal, 0.0))
                else:
                    self._health.failures += 1
                    yield result

    def generate(
        self, tasks: Sequence[PromptTask], *, avoid: Mapping[int, frozenset[str]]
    ) -> Iterator[Generated | Failed]:
        """Yield the continuation of each task; see `Target.generate`."""
        if self._sampling is None:
            raise ValueError("this target was made without sampling; give it the run's data.generate section")
        usable = []
        for task in tasks:
            reason = self._unusable(task)
            if reason is None:
                usable.append(task)
            else:
                yield Failed(task, reason, retryable=False, own_form=True)
        yield from self._generated(usable, self._sampling)

    def _unusable(self, task: PromptTask) -> str | None:
        longest = self._facts.max_position_embeddings
        if len(task.input_ids) > longest:
            return f"expected at most {longest} tokens, the target's context, found {len(task.input_ids)}"
        if self._sampling is not None and self._sampling.room(task) < 1:
            return f"no room for a continuation after {len(task.input_ids)} tokens"
        highest = max(task.input_ids, default=-1)
        if not 0 <= highest < self._facts.vocab_size:
            return f"token id {highest} is not of the target, whose vocabulary has {self._facts.vocab_size}"
        return None

    def _generated(self, tasks: list[PromptTask], sampling: Sampling) -> Iterator[Generated | Failed]:
        """Yield continuations: those that are known, then the rest, decoded within the token budget."""
        yield from (Generated(task, task.continuation) for task in tasks if task.continuation is not None)
        tasks = [task for task in tasks if task.continuation is None]
        rooms = {task.ordinal: sampling.room(task) for task in tasks}
        room = max(rooms.values(), default=0)
        for batch in token_batches(tasks, decode_budget(self._batch_tokens), room=room):
            yield from self._decoded(batch, sampling)

    def _decoded(self, batch: list[PromptTask], sampling: Sampling) -> Iterator[Generated | Failed]:
        began = time.perf_counter()
        try:
            with self._lock:
                rows = continue_tasks(
                    self._model,
                    batch,
                    sampling,
                    eos_token_ids=self._facts.eos_token_ids,
                    device=self._device,
                    on_step=self._works,
                )
        except (RuntimeError, IndexError) as error:
            yield from self._one_by_one(batch, error, lambda part: self._decoded(part, sampling))
            return
        share = (time.perf_counter() - began) / len(batch)
        for task, tokens in zip(batch, rows, strict=True):
            yield Generated(task, tokens, seconds=share)

    def _works(self) -> None:
        self._health.worked += 1

    def _captured(self, batch: list[PromptTask], originals: Mapping[int, PromptTask]) -> Iterator[Captured | Failed]:
        states = self._prepared()
        try:
            with self._lock:
                started = time.perf_counter()
                self._forward(states, batch)
                samples, forwarded, sound = self._taken(states, batch)
                copied = time.perf_counter()
        except (RuntimeError, IndexError) as error:
            yield from self._one_by_one(batch, error, lambda part: self._captured(part, originals))
            return
        finally:
            states.clear()
        self._known_good = batch
        self._works()
        share = 1 / len(batch)
        for task, tensors, finite in zip(batch, samples, sound, strict=True):
            original = originals[task.ordinal]
            if not finite:
                yield Failed(original, "the target's hidden states are not finite", retryable=False)
                continue
            yield Captured(
                task=original,
                tensors=tensors,
                num_tokens=len(task.input_ids),
                capture_s=(forwarded - started) * share,
                copy_s=(copied - forwarded) * share,
            )

    def _one_by_one(self, batch: list[PromptTask], error: Exception, again: Any) -> Iterator[Any]:
        """Yield the outcomes of the two halves of a batch that failed, down to the task that makes it fail."""
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        if len(batch) == 1:
            self._check_target(error)
            yield Failed(batch[0], f"{type(error).__name__}: {str(error).splitlines()[0]}", retryable=True)
            return
        log.warning("a batch of %d prompts failed, trying its halves: %s", len(batch), error)
        middle = len(batch) // 2
        yield from again(batch[:middle])
        yield from again(batch[middle:])

    def _check_target(self, error: Exception) -> None:
        """Run a batch that is known to be good: an error is the prompt's only if that passes right after it.

        A CUDA error stays with the process: every prompt that is left would fail. The batch is the last one that was
        captured, or before the first a few tokens that every model has.

        Raises:
            TargetBroken: it fails as well.
        """
        states = self._prepared()
        good = self._known_good or [PromptTask(ordinal=0, source="", input_ids=[0, 0, 0, 0], loss_mask=[0] * 4)]
        try:
            with self._lock:
                self._forward(states, good)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
        except (RuntimeError, IndexError) as further:
            first, found = str(error).splitlines()[0], str(further).splitlines()[0]
            raise TargetBroken(
                f"target {self._facts.model} on {self._device}: a prompt failed ({first}), and {len(good)} prompt(s) "
                f"that are known to be good fail right after it ({found}): it is the target's fault or its GPU's",
                classify(further),
            ) from further
        finally:
            states.clear()

    def _prepared(self) -> LayerStates:
        if self._states is None:
            raise TargetError(f"target {self._facts.model} was used before prepare() or after close()")
        return self._states

    def _forward(self, states: LayerStates, batch: list[PromptTask]) -> None:
        longest = max(len(task.input_ids) for task in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, task in enumerate(batch):
            ids[row, : len(task.input_ids)] = torch.tensor(task.input_ids)
        with torch.inference_mode():
            states.decoder.module(input_ids=ids.to(self._device), use_cache=False)

    def _taken(
        self, states: LayerStates, batch: list[PromptTask]
    ) -> tuple[list[Mapping[str, Tensor]], float, list[bool]]:
        """Return the samples of a forward pass, when it was done, and of each sample whether its states are finite.

        A GPU is given the copies while it computes: the host waits for it when there is nothing left to give it.
        """
        found = states.layers[-1] if states.last is None else states.last
        passed = torch.cuda.current_stream(found.device).record_event() if found.is_cuda else None
        forwarded = time.perf_counter()
        samples = self._trimmed(states, batch)
        finite = torch.stack([all_finite(found[row, : len(task.input_ids)]) for row, task in enumerate(batch)])
        if passed is not None:
            passed.synchronize()
            forwarded = time.perf_counter()
            for device in {states.layers[0].device, found.device}:
                torch.cuda.synchronize(device)
        return samples, forwarded, finite.tolist()

    def _trimmed(self, states: LayerStates, batch: list[PromptTask]) -> list[Mapping[str, Tensor]]:
        """Return the tensors of each sample without padding, on the CPU; from a GPU the copies are only begun."""
        width, dtype = self._facts.hidden_size, getattr(torch, self._facts.dtype)
        samples = []
        for row, task in enumerate(batch):
            tokens = len(task.input_ids)
            sample = self._allocate(shapes_of(self._capture, tokens, width, dtype), states.layers[0].device)
            sample["input_ids"].copy_(torch.tensor(task.input_ids, dtype=torch.int32))
            sample["loss_mask"].copy_(torch.tensor(task.loss_mask, dtype=torch.uint8))
            _side_by_side(sample["aux_hidden_states"], [state[row, :tokens] for state in states.layers])
            if states.last is not None:
                sample["last_hidden_state"].copy_(states.last[row, :tokens], non_blocking=True)
            samples.append(sample)
        return samples


def _side_by_side(into: Tensor, states: Sequence[Tensor]) -> None:
    """Write `states`, each ``[tokens, H]``, into the columns of `into` on the CPU; from a GPU without waiting.

    They are laid side by side where they are: a copy from a GPU into columns takes a detour and a host's pass.
    """
    device = states[0].device
    if device.type == "cpu":
        torch.cat(list(states), dim=-1, out=into)
    else:
        into.copy_(torch.cat([state.to(device) for state in states], dim=-1), non_blocking=True)


def _with_continuation(outcome: Generated) -> PromptTask:
    task = outcome.task
    return PromptTask(
        ordinal=task.ordinal,
        source=task.source,
        input_ids=task.input_ids + outcome.tokens,
        loss_mask=[0] * len(task.input_ids) + [1] * len(outcome.tokens),
    )


def token_batches(tasks: Sequence[PromptTask], budget: int, *, room: int = 0) -> list[list[PromptTask]]:
    """Return `tasks` in batches of similar length whose padded size is at most `budget` tokens.

    A function of the tasks alone. A task longer than the budget is a batch of its own; `room` tokens are added to
    each task's length.
    """
    batches: list[list[PromptTask]] = []
    for task in sorted(tasks, key=lambda task: (-len(task.input_ids), task.ordinal)):
        longest = len(batches[-1][0].input_ids) + room if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(task)
        else:
            batches.append([task])
    return batches
