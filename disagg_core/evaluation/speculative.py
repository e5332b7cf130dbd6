"""Speculative decoding with a draft of any method, in batches; greedy or sampled.

One pass: the method's drafter proposes up to k tokens, the target runs the last emitted token and the proposed ones at
once, the agreed prefix is kept and the target's own next token added, so that a pass yields 1 … k + 1 tokens. The
drafter then takes note of the kept tokens, with the target's states of the layers that its draft reads.

Greedy: a drafted token is kept if it is the target's argmax, so the output is the target's greedy continuation. With a
temperature: the rejection rule of Leviathan et al. (https://arxiv.org/abs/2211.17192) and Chen et al.
(https://arxiv.org/abs/2302.01318): keep a token drawn from q with probability min(1, p/q), else draw from
max(p - q, 0), normalised; the output then follows p, the target's own distribution, whatever q is.

"The target's argmax" is that of a pass over k + 1 tokens, which may differ in the last bits from a pass over one: other
matrix shapes sum in another order. Where two logits are closer than this noise, plain decoding itself is decided by
the shapes of its batch; `disagg_core.evaluation.accept_length` tells such ties from errors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from disagg_core.drafts.method import Drafter, DraftModel
from disagg_core.drafts.registry import method_of
from disagg_core.drafts.sampling import DraftedTokens, Sampler
from disagg_core.errors import BadInput
from disagg_core.evaluation.target_runner import TargetRunner
from disagg_core.run_spec.draft import draft_sections

Progress = Callable[[int, int], None]
"""Called with the number of finished prompts and of all prompts."""


@dataclass
class Generation:
    """The continuation of one prompt.

    `accepted` holds, for each target pass after the prompt's, how many drafted tokens were kept; a pass gives one
    token more. The first of `tokens` comes from the pass over the prompt, which is not counted; `tokens` ends at the
    length asked for or with an end-of-sequence token. The last pass counts whole, wherever the text ends in it: so do
    serving engines, and what a pass verified says nothing less for what stands before.

    A server that counts passes without saying which came when gives them `in_order` False. `seconds` are the prompt's
    own, where it was continued beside others and each is answered when it is done.
    """

    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    in_order: bool = True
    seconds: float | None = None

    @property
    def target_passes(self) -> int:
        """Passes of the target after the one over the prompt."""
        return len(self.accepted)

    @property
    def accept_length(self) -> float:
        """Tokens per target pass, 1 … k + 1; 1 if there was no pass."""
        return 1.0 + sum(self.accepted) / len(self.accepted) if self.accepted else 1.0


Decode = Callable[[Sequence[Sequence[int]]], list[Generation]]
"""Continues a batch of prompts."""


def speculative_generate(
    target: nn.Module,
    draft: DraftModel | None,
    input_ids: Sequence[int] | Tensor,
    *,
    draft_tokens: int = 5,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    eos_token_ids: Collection[int] = (),
) -> Generation:
    """Continue `input_ids` ([T] or [1, T]) by up to `max_new_tokens`; without a draft, by plain decoding.

    `target` is a transformers causal language model in eval mode; `draft` is attached to it, in its dtype and on its
    device. `draft_tokens` are proposed in each pass. Temperature 0 is greedy; `generator` seeds the sampling.

    Raises:
        BadInput: no prompt, a setting below its range, or more draft tokens than the draft can propose at once.
        TargetError: see `TargetRunner`.
    """
    ids = input_ids.flatten().tolist() if isinstance(input_ids, Tensor) else list(input_ids)
    return generate_all(
        target,
        draft,
        [ids],
        draft_tokens=draft_tokens,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        generator=generator,
        eos_token_ids=eos_token_ids,
    )[0]


def generate_all(
    target: nn.Module,
    draft: DraftModel | None,
    prompts: Sequence[Sequence[int]],
    *,
    draft_tokens: int = 5,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    eos_token_ids: Collection[int] = (),
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[Generation]:
    """Continue every prompt as `speculative_generate` does, `batch_size` at a time, prompts of like length together.

    Raises:
        BadInput: an empty prompt, a setting below its range, or more draft tokens than the draft can propose at once.
        TargetError: see `TargetRunner`.
    """
    if not all(len(prompt) for prompt in prompts):
        raise BadInput("evaluation: expected at least one token in every prompt, found an empty one")
    if min(draft_tokens, max_new_tokens, batch_size) < 1 or temperature < 0:
        raise BadInput(
            "evaluation: expected draft_tokens, max_new_tokens and batch_size of at least 1 and a temperature of at "
            f"least 0, found {draft_tokens}, {max_new_tokens}, {batch_size} and {temperature}"
        )
    if draft is not None:
        _check_draft_tokens(draft, draft_tokens)
    runner = TargetRunner(target, _layers_of(draft, target) if draft is not None else ())
    decoder = _Decoder(
        runner,
        draft,
        draft_tokens=draft_tokens if draft is not None else 0,
        max_new_tokens=max_new_tokens,
        sampler=Sampler(temperature, generator),
        eos=frozenset(eos_token_ids),
    )
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    size = 1 if runner.one_by_one else batch_size
    results: dict[int, Generation] = {}
    try:
        with torch.inference_mode():
            for start in range(0, len(prompts), size):
                chosen = by_length[start : start + size]
                batch = decoder.run([prompts[index] for index in chosen])
                results.update(zip(chosen, batch, strict=True))
                if progress is not None:
                    progress(len(results), len(prompts))
    finally:
        runner.close()
    return [results[index] for index in range(len(prompts))]


def _check_draft_tokens(draft: DraftModel, draft_tokens: int) -> None:
    method = method_of(draft.method)
    most = method.most_draft_tokens(draft.config)
    if most is not None and draft_tokens > most:
        raise BadInput(
            f"evaluation: expected draft_tokens of at most {most}, which is what this {method.title} draft proposes at "
            f"once, found {draft_tokens}"
        )


def _layers_of(draft: DraftModel, target: nn.Module) -> tuple[int, ...]:
    """Return the target's layers that `draft` reads: its own, or its method's default where its files do not say."""
    if draft.config.layers is not None:
        return draft.config.layers
    model: Any = target
    depth = model.config.get_text_config().num_hidden_layers
    options = draft_sections()[draft.method].model_validate({})
    return method_of(draft.method).capture(options, depth, None).layers


class _Decoder:
    """Decodes one batch after the other; with 0 draft tokens it is plain decoding through the same code."""

    def __init__(
        self,
        runner: TargetRunner,
        draft: DraftModel | None,
        *,
        draft_tokens: int,
        max_new_tokens: int,
        sampler: Sampler,
        eos: frozenset[int],
    ) -> None:
        self._runner = runner
        self._draft = draft
        self._draft_tokens = draft_tokens
        self._max_new_tokens = max_new_tokens
        self._sampler = sampler
        self._eos = eos

    def run(self, prompts: Sequence[Sequence[int]]) -> list[Generation]:
        runner = self._runner
        generations = [Generation() for _ in prompts]
        step = runner.prefill(prompts)
        pending, _ = self._sampler.pick(step.logits[:, -1])
        drafter = None
        if self._draft is not None:
            method = method_of(self._draft.method)
            drafter = method.drafter(self._draft, self._sampler, prompts, step.states, pending)
        active = generations
        going = [i for i, token in enumerate(pending.tolist()) if self._take(active[i], [token])]
        while going:
            if len(going) < len(active):
                active = [active[i] for i in going]
                rows = torch.tensor(going, device=pending.device)
                pending = pending[rows]
                runner.select(rows)
                if drafter is not None:
                    drafter.select(rows)
            emitted, pending = self._pass(drafter, pending)
            going = [i for i, row in enumerate(emitted) if self._take(active[i], row, counted=True)]
        return generations

    def _pass(self, drafter: Drafter | None, pending: Tensor) -> tuple[list[list[int]], Tensor]:
        """Run one target pass; return the tokens that it gives each row, and the last of them [batch]."""
        runner = self._runner
        if drafter is not None:
            drafted = drafter.propose(self._draft_tokens, runner.lengths)
        else:
            drafted = DraftedTokens.none(len(pending), pending.device)
        step = runner.extend(torch.cat((pending[:, None], drafted.ids), dim=1))
        accepted, own = self._sampler.verify(step.logits, drafted)
        if drafter is not None:
            drafter.follow(step.states, drafted, accepted, own, runner.lengths)
        runner.keep(accepted + 1, of=drafted.ids.shape[1] + 1)
        rows = zip(drafted.ids.tolist(), accepted.tolist(), own.tolist(), strict=True)
        return [[*ids[:count], last] for ids, count, last in rows], own

    def _take(self, generation: Generation, row: Sequence[int], *, counted: bool = False) -> bool:
        """Add the tokens of a pass to `generation`; return whether it goes on."""
        end = next((place for place, token in enumerate(row) if token in self._eos), None)
        kept = row if end is None else row[: end + 1]
        if counted:
            generation.accepted.append(len(row) - 1)
        generation.tokens.extend(kept[: self._max_new_tokens - len(generation.tokens)])
        return end is None and len(generation.tokens) < self._max_new_tokens
