"""Speculative decoding with an EAGLE-3 draft: chains, KV caches in both models, batches; greedy or sampled.

One pass: the draft drafts k tokens, the target runs the last emitted token and the k drafted ones at once, the agreed
prefix is kept and the target's own next token added, so that a pass yields 1 … k + 1 tokens. The draft's cache then
takes the kept tokens with the target's aux states in place of its own guesses.

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

import torch
from torch import Tensor, nn

from disagg_core.drafts.eagle3.drafter import DraftChain
from disagg_core.drafts.eagle3.model import Eagle3Draft
from disagg_core.drafts.sampling import DraftedTokens, Sampler
from disagg_core.errors import BadInput
from disagg_core.evaluation.target_runner import TargetRunner

Progress = Callable[[int, int], None]
"""Called with the number of finished prompts and of all prompts."""


@dataclass
class Generation:
    """The continuation of one prompt.

    `accepted` holds, for each target pass after the prompt's, how many drafted tokens were kept; a pass gives one
    token more. The first of `tokens` comes from the pass over the prompt, which is not counted; `tokens` is cut at the
    length asked for, the count of the last pass is not, and a pass ends with an end-of-sequence token.
    """

    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def target_passes(self) -> int:
        """Passes of the target after the one over the prompt."""
        return len(self.accepted)

    @property
    def accept_length(self) -> float:
        """Tokens per target pass, 1 … k + 1; 1 if there was no pass."""
        return 1.0 + sum(self.accepted) / len(self.accepted) if self.accepted else 1.0


def speculative_generate(
    target: nn.Module,
    draft: Eagle3Draft | None,
    input_ids: Sequence[int] | Tensor,
    *,
    draft_tokens: int = 5,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    eos_token_ids: Collection[int] = (),
) -> Generation:
    """Continue `input_ids` ([T] or [1, T]) by up to `max_new_tokens`; without a draft, by plain decoding.

    `target` is a transformers causal language model in eval mode, `draft` has the target's embedding set. Temperature
    0 is greedy; `generator` seeds the sampling.

    Raises:
        BadInput: no prompt, or a setting below its range.
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
    draft: Eagle3Draft | None,
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
        BadInput: an empty prompt, or a setting below its range.
        TargetError: see `TargetRunner`.
    """
    if not all(len(prompt) for prompt in prompts):
        raise BadInput("evaluation: expected at least one token in every prompt, found an empty one")
    if min(draft_tokens, max_new_tokens, batch_size) < 1 or temperature < 0:
        raise BadInput(
            "evaluation: expected draft_tokens, max_new_tokens and batch_size of at least 1 and a temperature of at "
            f"least 0, found {draft_tokens}, {max_new_tokens}, {batch_size} and {temperature}"
        )
    runner = TargetRunner(target, draft.config.aux_layer_ids if draft is not None else None)
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


class _Decoder:
    """Decodes one batch after the other; with 0 draft tokens it is plain decoding through the same code."""

    def __init__(
        self,
        runner: TargetRunner,
        draft: Eagle3Draft | None,
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
        chain = DraftChain(self._draft, self._sampler, prompts, step.aux, pending) if self._draft is not None else None
        active = generations
        going = [i for i, token in enumerate(pending.tolist()) if self._take(active[i], [token])]
        while going:
            if len(going) < len(active):
                active = [active[i] for i in going]
                rows = torch.tensor(going, device=pending.device)
                pending = pending[rows]
                runner.select(rows)
                if chain:
                    chain.select(rows)
            emitted, pending = self._pass(chain, pending)
            going = [i for i, row in enumerate(emitted) if self._take(active[i], row, counted=True)]
        return generations

    def _pass(self, chain: DraftChain | None, pending: Tensor) -> tuple[list[list[int]], Tensor]:
        """Run one target pass; return the tokens that it gives each row, and the last of them [batch]."""
        runner = self._runner
        if chain:
            drafted = chain.propose(self._draft_tokens, runner.lengths)
        else:
            drafted = DraftedTokens.none(len(pending), pending.device)
        step = runner.extend(torch.cat((pending[:, None], drafted.ids), dim=1))
        accepted, own = self._sampler.verify(step.logits, drafted, chain.target_ids if chain else pending)
        if chain:
            chain.follow(step.aux, drafted, accepted, own, runner.lengths)
        runner.keep(accepted + 1, of=drafted.ids.shape[1] + 1)
        rows = zip(drafted.ids.tolist(), accepted.tolist(), own.tolist(), strict=True)
        return [[*ids[:count], last] for ids, count, last in rows], own

    def _take(self, generation: Generation, row: Sequence[int], *, counted: bool = False) -> bool:
        """Add the tokens of a pass to `generation`; return whether it goes on."""
        end = next((place for place, token in enumerate(row) if token in self._eos), None)
        kept = row if end is None else row[: end + 1]
        if counted:
            generation.accepted.append(len(kept) - 1)
        generation.tokens.extend(kept[: self._max_new_tokens - len(generation.tokens)])
        return end is None and len(generation.tokens) < self._max_new_tokens
