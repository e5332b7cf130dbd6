"""Continuations by the target itself: batched decoding with a KV cache, greedy or sampled, the same in every attempt.

Rows are padded on the left and decoded together; rows that are finished are dropped from the batch once they are half
of it. Sampling draws its random numbers beforehand, one row of them from a generator that is seeded by the run's seed
and the prompt's ordinal: neither the batch nor the attempt changes what a prompt draws.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from disagg_core.contracts import PromptTask
from disagg_core.processes.interrupt import check_interrupt
from disagg_core.prompts.order import seed_of
from disagg_core.run_spec.document import GenerateSection

_SAMPLING = 3


Untrainable: TypeAlias = Callable[[Sequence[int]], str | None]
"""Says why a sample with a loss mask teaches the run's draft nothing; None where it does."""


def any_sample(loss_mask: Sequence[int]) -> None:
    """Refuse no sample."""


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn; `temperature` 0 is greedy. `seed` is the run's."""

    max_new_tokens: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    untrainable: Untrainable = any_sample

    @classmethod
    def of(
        cls, generate: GenerateSection, *, max_tokens: int, seed: int, untrainable: Untrainable = any_sample
    ) -> Sampling:
        """Return the sampling of a run document."""
        return cls(
            max_new_tokens=generate.max_new_tokens,
            max_tokens=max_tokens,
            temperature=generate.temperature,
            top_p=generate.top_p,
            seed=seed,
            untrainable=untrainable,
        )

    def room(self, task: PromptTask) -> int:
        """Return how many tokens the continuation of `task` may have."""
        return min(self.max_new_tokens, self.max_tokens - len(task.input_ids))

    def refused(self, task: PromptTask, tokens: Sequence[int]) -> str | None:
        """Return why `task` with the continuation `tokens` is no sample to train on, or None if it is one."""
        return self.untrainable([0] * len(task.input_ids) + [1] * len(tokens))

    def seed_for(self, ordinal: int) -> int:
        """Return the seed of the continuation of the prompt at `ordinal` (63 bits)."""
        return seed_of(self.seed, _SAMPLING, ordinal) >> 1


def continue_tasks(
    model: Any,
    tasks: Sequence[PromptTask],
    sampling: Sampling,
    *,
    eos_token_ids: Collection[int],
    device: torch.device,
    on_step: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Return the continuation of each task by a transformers causal LM, ending with an end-of-text id if it came.

    All tasks are decoded as one batch. `check_interrupt` is asked before each step, `on_step` is called with it.
    """
    rooms = [sampling.room(task) for task in tasks]
    draws = _draws(tasks, rooms, sampling) if sampling.temperature > 0 else None
    from disagg_core.engines.decoding import attention_by_groups

    with torch.inference_mode(), attention_by_groups(model):
        prompts = [task.input_ids for task in tasks]
        return _decode(model, prompts, rooms, draws, sampling, eos_token_ids, device, on_step)


def _draws(tasks: Sequence[PromptTask], rooms: Sequence[int], sampling: Sampling) -> Tensor:
    """Return the uniform random numbers of all rows: [rows, longest room] float64, on the CPU."""
    draws = torch.zeros(len(tasks), max(rooms), dtype=torch.float64)
    for row, (task, room) in enumerate(zip(tasks, rooms, strict=True)):
        generator = torch.Generator().manual_seed(sampling.seed_for(task.ordinal))
        draws[row, :room] = torch.rand(room, dtype=torch.float64, generator=generator)
    return draws


def _decode(
    model: Any,
    prompts: Sequence[list[int]],
    rooms: Sequence[int],
    draws: Tensor | None,
    sampling: Sampling,
    eos_token_ids: Collection[int],
    device: torch.device,
    on_step: Callable[[], None],
) -> list[list[int]]:
    from disagg_core.engines.decoding import cache_for

    ids, mask = _pad_left(prompts, max(rooms), device)  # [rows, prompt], [rows, prompt + longest room]
    width = ids.shape[1]
    positions = (mask[:, :width].cumsum(-1) - 1).clamp_min(0)
    cache = cache_for(model.config, max(rooms))
    alive = list(range(len(prompts)))
    kept = list(alive)  # the rows that are in the batch, finished or not
    tokens: list[list[int]] = [[] for _ in prompts]
    for step in range(max(rooms)):
        check_interrupt()
        on_step()
        logits = model(
            input_ids=ids,
            attention_mask=mask[:, : width + step],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # [rows, vocabulary]
        chosen = choose_tokens(logits, draws[kept, step] if draws is not None else None, sampling)
        for row, token in zip(kept, chosen.tolist(), strict=True):
            if row in alive:
                tokens[row].append(token)
        alive = [r for r in alive if tokens[r][-1] not in eos_token_ids and len(tokens[r]) < rooms[r]]
        if not alive:
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        if 2 * len(alive) <= len(kept):
            index = torch.tensor([kept.index(row) for row in alive], device=device)
            cache.batch_select_indices(index)
            ids, positions, mask = ids[index], positions[index], mask[index]
            kept = list(alive)
    return tokens


def _pad_left(prompts: Sequence[list[int]], room: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids [rows, longest], zeros on the left, and the mask [rows, longest + room] with ones after them."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.ones(len(prompts), longest + room, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, : longest - len(prompt)] = 0
    return ids.to(device), mask.to(device)


def choose_tokens(logits: Tensor, draws: Tensor | None, sampling: Sampling) -> Tensor:
    """Return the next token of each row: [rows] int64.

    `logits` is [rows, vocabulary]; `draws` [rows] are uniform numbers in [0, 1), or None for greedy. Sampling inverts
    the cumulative distribution over the nucleus, most likely token first.
    """
    if draws is None:
        return logits.argmax(-1)
    ordered, indices = (logits.float() / sampling.temperature).sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    inside = cumulative - probabilities < sampling.top_p  # the token that crosses top_p belongs to the nucleus
    cumulative = (probabilities * inside).cumsum(-1)
    thresholds = draws.to(cumulative) * cumulative[:, -1]
    picks = torch.searchsorted(cumulative, thresholds[:, None], right=True)
    last = inside.sum(-1, keepdim=True) - 1
    return indices.gather(-1, torch.minimum(picks, last))[:, 0]
