"""How a token is chosen from logits, and which drafted tokens stand: greedy agreement or the rejection rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftedTokens:
    """k tokens for each row of a batch, and what they were drawn from. Make it with `picked_from`, or `none`.

    Of row i the first `counts[i]` tokens are proposals; the rest is filler, any ids of the vocabulary, and never
    stands. Whether a token is a proposal may depend on the tokens before it but not on itself, or it would no longer
    follow `probabilities`. The candidates of a slot are distinct.
    """

    ids: Tensor  # [batch, k] int64, target vocabulary
    picked: Tensor  # [batch, k] int64, index among the candidates
    candidates: Tensor  # [C] int64, target ids that every slot was picked from; or [batch, k, C], for each slot its own
    probabilities: Tensor | None = None  # [batch, k, C] fp32 that each was drawn from; None when greedy
    counts: Tensor | None = None  # [batch] int64, proposals in each row; None: all k

    @classmethod
    def picked_from(
        cls, candidates: Tensor, picked: Tensor, probabilities: Tensor | None, counts: Tensor | None = None
    ) -> DraftedTokens:
        """Return the tokens at index `picked` of the `candidates`; shapes as those of the fields."""
        chosen = candidates[picked] if candidates.dim() == 1 else candidates.gather(2, picked[:, :, None]).squeeze(2)
        return cls(chosen, picked, candidates, probabilities, counts)

    @classmethod
    def none(cls, batch: int, device: torch.device) -> DraftedTokens:
        """Return what plain decoding drafts: no token for each of `batch` rows."""
        empty = torch.empty(batch, 0, dtype=torch.int64, device=device)
        return cls(empty, empty, torch.empty(0, dtype=torch.int64, device=device))

    @property
    def proposed(self) -> Tensor:
        """How many tokens of each row are proposals, [batch] int64."""
        if self.counts is not None:
            return self.counts
        return torch.full((len(self.ids),), self.ids.shape[1], dtype=torch.int64, device=self.ids.device)


class Sampler:
    """Chooses tokens at a temperature; 0 is greedy. `generator` seeds what is random."""

    def __init__(self, temperature: float, generator: torch.Generator | None = None) -> None:
        self.greedy = temperature == 0.0
        self._temperature = temperature
        self._generator = generator

    def pick(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return an index [...] into `logits` [..., n], and the probabilities [..., n] fp32 it was drawn from."""
        if self.greedy:
            return logits.argmax(-1), None
        probabilities = self._probabilities(logits)
        return self._draw(probabilities), probabilities

    def verify(self, logits: Tensor, drafted: DraftedTokens) -> tuple[Tensor, Tensor]:
        """Return how many drafted tokens stand [batch], and the target's own token after them [batch].

        `logits` are the target's, [batch, k + 1, V], the first after the token before the drafted ones. A row whose
        proposals all stand gets a token drawn from p, the target's distribution, whether k of them or fewer; after a
        rejected one it is drawn from max(p - q, 0), normalised. Tokens without probabilities were certain: q is 1.
        """
        count = drafted.ids.shape[1]
        proposed = drafted.proposed
        slots = torch.arange(count, device=logits.device)
        inside = slots < proposed[:, None]
        if self.greedy:
            own = logits.argmax(-1)
            accepted = _leading(inside & (own[:, :count] == drafted.ids))
            return accepted, own.gather(1, accepted[:, None]).squeeze(1)
        wanted = self._probabilities(logits)
        p = wanted[:, :count].gather(2, drafted.ids[:, :, None]).squeeze(2)
        chance = torch.rand(p.shape, generator=self._generator, device=p.device)
        if drafted.probabilities is not None:
            chance = chance * drafted.probabilities.gather(2, drafted.picked[:, :, None]).squeeze(2)
        accepted = _leading(inside & (chance < p))
        p = wanted[torch.arange(len(wanted), device=wanted.device), accepted]
        rest = (p - _rejected_from(drafted, accepted, vocab_size=p.shape[1])).clamp(min=0)
        return accepted, self._draw(torch.where(rest.sum(-1, keepdim=True) > 0, rest, p))

    def _probabilities(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits.float() / self._temperature, dim=-1)

    def _draw(self, weights: Tensor) -> Tensor:
        drawn = torch.multinomial(weights.reshape(-1, weights.shape[-1]), 1, generator=self._generator)
        return drawn.view(weights.shape[:-1])


def _leading(stands: Tensor) -> Tensor:
    """Return how many tokens at the start of each row of `stands` [batch, k] are true."""
    return stands.long().cumprod(1).sum(1)


def _rejected_from(drafted: DraftedTokens, accepted: Tensor, *, vocab_size: int) -> Tensor:
    """Return q [batch, V] that the first rejected token of each row was drawn from; zero where none was rejected."""
    q = torch.zeros(len(accepted), vocab_size, device=accepted.device)
    rows = (accepted < drafted.proposed).nonzero().flatten()
    slots = accepted[rows]
    if drafted.probabilities is None:
        q[rows, drafted.ids[rows, slots]] = 1.0
    else:
        ids = drafted.candidates if drafted.candidates.dim() == 1 else drafted.candidates[rows, slots]
        q[rows[:, None], ids] = drafted.probabilities[rows, slots]
    return q
