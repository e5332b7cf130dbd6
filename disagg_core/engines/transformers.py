"""A target that runs in this process: any causal language model of transformers, on CPU, one GPU or several.

Hidden states are taken by forward hooks on the chosen decoder layers and the final norm, nothing else is kept; the
LM head is not run for a capture. Batches are padded on the right and need no attention mask: attention is causal, so
no real token sees the padding behind it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disagg_core.contracts import PromptTask, RunIdentity
from disagg_core.engines.contract import Captured, CaptureOutcome, Failed, Generated, ServerHealth
from disagg_core.engines.generation import Sampling, continue_tasks
from disagg_core.errors import MissingLibrary, TargetError
from disagg_core.run_spec.document import TargetSection
from disagg_core.run_spec.section import is_local
from disagg_core.store.outgoing import Allocate, allocate_plain
from disagg_core.target.facts import TargetFacts

log = logging.getLogger(__name__)

_NORM_NAMES = ("norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f")
_USABLE_MEMORY = 0.8
_TOKENS_PER_PLACE = 64  # of shorter prompts a batch could hold more than a group, of longer ones a group is several
_LARGEST_GROUP = 64
_DECODE_FACTOR = 4  # a decoding step holds keys and values of its tokens only, and is the cheaper the wider it is


def group_for(batch_tokens: int) -> int:
    """Return how many prompts a group has that is captured with batches of `batch_tokens` padded tokens."""
    return min(_LARGEST_GROUP, max(1, batch_tokens // _TOKENS_PER_PLACE))


class TransformersTarget:
    """The `Target` that runs transformers itself. See `disagg_core.engines.contract` for the contract.

    `sampling` switches generation on. `model` is a loaded causal LM to use instead of loading `section.model`.
    `allocate` makes the tensors that samples are handed over in; a store's own is for samples that it will be given.
    """

    concurrency = 1

    def __init__(
        self,
        section: TargetSection,
        facts: TargetFacts,
        *,
        batch_tokens: int = 8192,
        sampling: Sampling | None = None,
        model: nn.Module | None = None,
        allocate: Allocate = allocate_plain,
    ) -> None:
        self.batch_size = group_for(batch_tokens)
        self._section = section
        self._facts = facts
        self._batch_tokens = batch_tokens
        self._sampling = sampling
        self._allocate = allocate
        self._model: Any = model
        self._device = torch.device("cpu")
        self._states: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._lock = threading.Lock()
        self._health = ServerHealth("local")

    # --- life ------------------------------------------------------------------------------------------------------

    def prepare(self, identity: RunIdentity) -> None:
        """Load the model and check it against `identity`; on a prepared target check the new identity only."""
        for name, expected, found in (
            ("model", identity.target_model_version, self._facts.version),
            ("capture layers", identity.aux_layers, self._facts.aux_layers),
            ("dtype", identity.dtype, self._facts.dtype),
        ):
            if expected != found:
                raise TargetError(f"target {self._facts.model}: expected {name} {expected}, found {found}")
        if self._hooks:
            return
        if self._model is None:
            self._model = _load(self._section, self._facts)
        self._model.eval().requires_grad_(False)
        self._device = next(self._model.parameters()).device
        decoder, layers, norm = decoder_parts(self._model, self._facts)
        self._decoder = decoder
        self._names = [f"layer {layer}" for layer in self._facts.aux_layers]
        for name, module in [
            *zip(self._names, (layers[i] for i in self._facts.aux_layers), strict=True),
            ("last", norm),
        ]:
            self._hooks.append(module.register_forward_hook(self._keep(name)))
        self._health.state = "closed"

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._states[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    def close(self) -> None:
        """Remove the hooks and let the model go."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._states.clear()
        self._model = self._decoder = None

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
                yield Failed(task, reason, retryable=False)
        if self._sampling is not None:
            continued: list[PromptTask] = []
            for outcome in self._generated(usable, self._sampling):
                if isinstance(outcome, Failed):
                    yield outcome
                elif len(outcome.task.input_ids) + len(outcome.tokens) < 3:
                    yield Failed(outcome.task, "prompt and continuation have less than 3 tokens", retryable=False)
                else:
                    continued.append(_with_continuation(outcome))
            usable = continued
        originals = {task.ordinal: task for task in tasks}
        for batch in token_batches(usable, self._batch_tokens):
            for result in self._captured(batch, originals):
                if isinstance(result, Captured):
                    self._health.captured += 1
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
                yield Failed(task, reason, retryable=False)
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
        """Yield continuations, decoded in batches whose longest possible cache fits the token budget."""
        rooms = {task.ordinal: sampling.room(task) for task in tasks}
        room = max(rooms.values(), default=0)
        for batch in token_batches(tasks, _DECODE_FACTOR * self._batch_tokens, room=room):
            yield from self._decoded(batch, sampling)

    def _decoded(self, batch: list[PromptTask], sampling: Sampling) -> Iterator[Generated | Failed]:
        try:
            with self._lock:
                rows = continue_tasks(
                    self._model, batch, sampling, eos_token_ids=self._facts.eos_token_ids, device=self._device
                )
        except (RuntimeError, IndexError) as error:
            yield from self._one_by_one(batch, error, lambda part: self._decoded(part, sampling))
            return
        for task, tokens in zip(batch, rows, strict=True):
            yield Generated(task, tokens)

    def _captured(self, batch: list[PromptTask], originals: Mapping[int, PromptTask]) -> Iterator[Captured | Failed]:
        try:
            with self._lock:
                started = time.perf_counter()
                self._forward(batch)
                forwarded = time.perf_counter()
                samples = self._trimmed(batch)
                copied = time.perf_counter()
        except (RuntimeError, IndexError) as error:
            yield from self._one_by_one(batch, error, lambda part: self._captured(part, originals))
            return
        finally:
            self._states.clear()
        share = 1 / len(batch)
        for task, tensors in zip(batch, samples, strict=True):
            original = originals[task.ordinal]
            if not bool(tensors["last_hidden_state"].sum(dtype=torch.float32).isfinite()):
                yield Failed(original, "the target's last hidden states are not finite", retryable=False)
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
        if len(batch) == 1:
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            yield Failed(batch[0], f"{type(error).__name__}: {str(error).splitlines()[0]}", retryable=True)
            return
        log.warning("a batch of %d prompts failed, trying its halves: %s", len(batch), error)
        middle = len(batch) // 2
        yield from again(batch[:middle])
        yield from again(batch[middle:])

    def _forward(self, batch: list[PromptTask]) -> None:
        longest = max(len(task.input_ids) for task in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, task in enumerate(batch):
            ids[row, : len(task.input_ids)] = torch.tensor(task.input_ids)
        with torch.inference_mode():
            self._decoder(input_ids=ids.to(self._device), use_cache=False)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _trimmed(self, batch: list[PromptTask]) -> list[Mapping[str, Tensor]]:
        """Return the tensors of each sample without padding, on the CPU."""
        width, dtype = self._facts.hidden_size, self._states["last"].dtype
        samples = []
        for row, task in enumerate(batch):
            tokens = len(task.input_ids)
            sample = self._allocate(
                {
                    "input_ids": ((tokens,), torch.int32),
                    "loss_mask": ((tokens,), torch.uint8),
                    "aux_hidden_states": ((tokens, 3 * width), dtype),
                    "last_hidden_state": ((tokens, width), dtype),
                }
            )
            sample["input_ids"].copy_(torch.tensor(task.input_ids, dtype=torch.int32))
            sample["loss_mask"].copy_(torch.tensor(task.loss_mask, dtype=torch.uint8))
            for third, name in enumerate(self._names):
                part = sample["aux_hidden_states"][:, third * width : (third + 1) * width]
                part.copy_(self._states[name][row, :tokens])
            sample["last_hidden_state"].copy_(self._states["last"][row, :tokens])
            samples.append(sample)
        return samples


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


def decoder_parts(model: Any, facts: TargetFacts) -> tuple[Any, nn.ModuleList, nn.Module]:
    """Return the decoder of a causal LM, its layers and its final norm.

    Raises:
        TargetError: the model is not of the sizes in `facts`, or is built in a way that is not known.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
    stacks = [part for part in decoder.children() if isinstance(part, nn.ModuleList) and len(part) == facts.num_layers]
    norms = [part for name, part in decoder.named_children() if name in _NORM_NAMES]
    if len(stacks) != 1 or len(norms) != 1:
        raise TargetError(
            f"target {facts.model}: expected a decoder with one stack of {facts.num_layers} layers and one final norm "
            f"({', '.join(_NORM_NAMES)}), found {', '.join(name for name, _ in decoder.named_children())}"
        )
    width = model.get_input_embeddings().weight.shape[1]
    if width != facts.hidden_size:
        raise TargetError(f"target {facts.model}: expected hidden size {facts.hidden_size}, found {width}")
    return decoder, stacks[0], norms[0]


def _load(section: TargetSection, facts: TargetFacts) -> Any:
    from transformers import AutoModelForCausalLM

    source = str(Path(section.model).expanduser()) if is_local(section.model) else section.model
    placement = _placement(section, facts)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
            dtype=getattr(torch, facts.dtype),
            **({"device_map": "auto"} if placement == "spread" else {}),
        )
    except (OSError, ValueError) as error:
        raise TargetError(f"target.model: cannot load {section.model!r}: {str(error).splitlines()[0]}") from error
    return model if placement == "spread" else model.to(placement)


def _placement(section: TargetSection, facts: TargetFacts) -> str:
    """Return ``cpu``, ``cuda``, or ``spread`` for a model that one GPU cannot hold."""
    available = torch.cuda.is_available()
    if section.device == "cuda" and not available:
        raise TargetError("target.device: expected a CUDA device, found none; use cpu or auto")
    if section.device == "cpu" or not available:
        return "cpu"
    free, _ = torch.cuda.mem_get_info()
    if _weight_bytes(facts) <= free * _USABLE_MEMORY:
        return "cuda"
    try:
        import accelerate  # type: ignore[import-not-found] # noqa: F401
    except ImportError as error:
        raise MissingLibrary(
            f"target {facts.model} does not fit one GPU ({free >> 30} GiB free); to spread it over "
            f"{torch.cuda.device_count()}: pip install accelerate"
        ) from error
    return "spread"


def _weight_bytes(facts: TargetFacts) -> int:
    """Return an estimate of the weights' size from the config (dense layers)."""
    heads = (2 * facts.num_attention_heads + 2 * facts.num_key_value_heads) * facts.head_dim
    layer = facts.hidden_size * (heads + 3 * facts.intermediate_size)
    embeddings = facts.vocab_size * facts.hidden_size * (1 if facts.tie_word_embeddings else 2)
    return (facts.num_layers * layer + embeddings) * (4 if facts.dtype == "float32" else 2)
