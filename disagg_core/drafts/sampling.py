"""How a token is chosen from logits, and which drafted tokens stand: greedy agreement or the rejection rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftedTokens:
    """A chain of k tokens for each row of a batch."""

    ids: Tensor  # [batch, k] int64, target vocabulary
    picked: Tensor  # [batch, k] int64, draft vocabulary
    probabilities: Tensor | None  # [batch, k, K] fp32 that each was drawn from; None when greedy

    @classmethod
    def none(cls, batch: int, device: torch.device) -> DraftedTokens:
        """Return the chain of plain decoding: no token for each of `batch` rows."""
        empty = torch.empty(batch, 0, dtype=torch.int64, device=device)
        return cls(empty, empty, None)


class Sampler:
    """Chooses tokens at a temperature; 0 is greedy. `generator` seeds what is random."""

    def __init__(self, temperature: float, generator: torch.Generator | None = None) -> None:
        self.greedy = temperature == 0.0
        self._temperature = temperature
        self._generator = generator

    def pick(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return an id [batch] for each row of `logits` [batch, n], and the probabilities it was drawn from."""
        if self.greedy:
            return logits.argmax(-1), None
        probabilities = self._probabilities(logits)
        return self._draw(probabilities), probabilities

    def verify(self, logits: Tensor, drafted: DraftedTokens, target_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many drafted tokens stand [batch], and the target's own token after them [batch].

        Args:
            logits: the target's, [batch, k + 1, V], the first after the token before the chain.
            drafted: the chain.
            target_ids: [K], the target's id of each token of the draft's vocabulary.
        """
        count = drafted.ids.shape[1]
        if self.greedy:
            own = logits.argmax(-1)
            accepted = (own[:, :count] == drafted.ids).long().cumprod(1).sum(1)
            return accepted, own.gather(1, accepted[:, None]).squeeze(1)
        wanted = self._probabilities(logits)
        if drafted.probabilities is None:
            nothing = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
            return nothing, self._draw(wanted[:, 0])
        p = wanted[:, :count].gather(2, drafted.ids[:, :, None]).squeeze(2)
        q = drafted.probabilities.gather(2, drafted.picked[:, :, None]).squeeze(2)
        chance = torch.rand(p.shape, generator=self._generator, device=p.device)
        accepted = (chance * q < p).long().cumprod(1).sum(1)
        return accepted, self._draw_rest(wanted, drafted.probabilities, accepted, target_ids)

    def _draw_rest(self, wanted: Tensor, offered: Tensor, accepted: Tensor, target_ids: Tensor) -> Tensor:
        """Draw from max(p - q, 0) at the first rejected position, and from p where all tokens stand."""
        rows = torch.arange(len(accepted), device=accepted.device)
        count = offered.shape[1]
        p = wanted[rows, accepted]
        q = torch.zeros_like(p)
        q[:, target_ids] = offered[rows, accepted.clamp(max=count - 1)] * (accepted < count)[:, None]
        rest = (p - q).clamp(min=0)
        return self._draw(torch.where(rest.sum(-1, keepdim=True) > 0, rest, p))

    def _probabilities(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits.float() / self._temperature, dim=-1)

    def _draw(self, weights: Tensor) -> Tensor:
        return torch.multinomial(weights, 1, generator=self._generator).squeeze(-1)
