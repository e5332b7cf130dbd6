"""Tiny random targets, untrained drafts for them, a draft that knows what the target will say, and one of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from disagg_core.drafts.eagle3 import DraftCache, Eagle3Config, Eagle3Draft
from disagg_core.drafts.method import Drafter, DraftModel
from disagg_core.drafts.sampling import DraftedTokens, Sampler
from disagg_core.drafts.vocab import VocabMap

VOCAB = 64
AUX_LAYERS = (0, 1, 2)


def make_target(vocab: int = VOCAB, *, context: float = 0.25, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random target; `context` says how much attention and MLP add to the last token's embedding."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": vocab,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            **changes,
        }
    )
    target = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in target.named_parameters():
        if parameter.dim() > 1:
            small = name.endswith(("o_proj.weight", "down_proj.weight"))
            torch.nn.init.normal_(parameter, std=context if small else 1.0 if "embed" in name else 0.4)
    return target


def make_draft(
    target: LlamaForCausalLM, *, draft_vocab: int | None = None, seed: int = 1, **changes: Any
) -> Eagle3Draft:
    torch.manual_seed(seed)
    sizes = target.config
    config = Eagle3Config.from_dict(
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": sizes.vocab_size,
            "draft_vocab_size": draft_vocab or sizes.vocab_size,
            "max_position_embeddings": 256,
            "aux_layer_ids": AUX_LAYERS,
            "initializer_range": 0.1,
            **changes,
        }
    )
    draft = Eagle3Draft(config)
    if not config.owns_embedding:
        draft.set_embedding(target.get_input_embeddings().weight)
    if draft_vocab:
        counts = torch.randperm(sizes.vocab_size, generator=torch.Generator().manual_seed(seed))
        draft.set_vocab_map(VocabMap.from_counts(counts, draft_vocab))
    return draft.eval()


class OracleDraft(Eagle3Draft):
    """A draft that looks up most tokens in known continuations, and misses some: kept and rejected in every mixture.

    It goes through the real draft's cache, so whatever is wrong with positions or padding there still fails.
    """

    def __init__(self, draft: Eagle3Draft, known: list[list[int]], *, misses: float = 0.2) -> None:
        super().__init__(draft.config)
        self.load_state_dict(draft.state_dict())
        self.set_embedding(draft.embed_tokens.weight)
        self._next: dict[tuple[int, int], int] = {}
        for tokens in known:
            self._next.update({(t, token): following for t, (token, following) in enumerate(pairwise(tokens))})
        self._generator = torch.Generator().manual_seed(0)
        self._misses = misses

    def decode(
        self, state: torch.Tensor, input_ids: torch.Tensor, positions: torch.Tensor, cache: DraftCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits, after = super().decode(state, input_ids, positions, cache)
        draft_id = {int(target_id): i for i, target_id in enumerate(self.to_target_ids(torch.arange(logits.shape[2])))}
        miss = torch.rand(input_ids.shape, generator=self._generator) < self._misses
        for row, column in torch.cartesian_prod(*map(torch.arange, input_ids.shape)).tolist():
            place = int(positions[row, column]) + 1, int(input_ids[row, column])
            if not miss[row, column] and self._next.get(place) in draft_id:
                logits[row, column, draft_id[self._next[place]]] += 100.0
        return logits, after


class BlockDraft(DraftModel):
    """A draft of another kind: blocks of up to `block` tokens, each from candidates of its own slot.

    Where it drafts for one of the `known` texts, the right token is mostly the best candidate; elsewhere it has a taste
    of its own, another in each slot. Rows propose unlike numbers of tokens, the rest of their block is filler.
    """

    method = "block"

    def __init__(
        self,
        vocab: int,
        known: Sequence[Sequence[int]] = (),
        *,
        block: int = 5,
        candidates: int = 3,
        misses: float = 0.1,
    ) -> None:
        super().__init__()
        self.config: Any = SimpleNamespace(vocab_size=vocab, layers=(0, 2), block=block)
        self.known, self.candidates, self.misses = [list(text) for text in known], candidates, misses
        self.random = torch.Generator().manual_seed(3)

    def attach(self, parts: Any, vocab_map: Any = None) -> None:
        raise NotImplementedError

    def serving_state_dict(self) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def load_serving_state_dict(self, state: Any) -> None:
        raise NotImplementedError


class BlockDrafter(Drafter):
    """Knows each row's text; insists on being told the truth about it."""

    def __init__(
        self, draft: BlockDraft, sampler: Sampler, prompts: Sequence[Sequence[int]], states: torch.Tensor, first: Any
    ) -> None:
        self._draft, self._sampler, self._width = draft, sampler, states.shape[2]
        self._texts = [[*prompt, token] for prompt, token in zip(prompts, first.tolist(), strict=True)]
        assert states.shape[:2] == (len(prompts), max(map(len, prompts)))

    def propose(self, count: int, lengths: torch.Tensor) -> DraftedTokens:
        assert lengths.tolist() == [len(text) - 1 for text in self._texts]
        draft = self._draft
        batch, k, vocab = len(self._texts), min(count, draft.config.block), draft.config.vocab_size
        taste = 2 * torch.cos(torch.arange(vocab) + 2.0 * torch.arange(k)[:, None])
        order = torch.rand(batch, k, vocab, generator=draft.random) - taste
        boost = torch.zeros(batch, k, draft.candidates)
        for row, text in enumerate(self._texts):
            whole = next((known for known in draft.known if known[: len(text)] == text), text)
            for slot, token in enumerate(whole[len(text) : len(text) + k]):
                order[row, slot, token] = -9.0  # the first of the candidates
                boost[row, slot, 0] = 20.0 * (torch.rand((), generator=draft.random) > draft.misses)
        candidates = order.argsort(-1)[..., : draft.candidates]
        picked, probabilities = self._sampler.pick(boost + taste.expand(batch, k, vocab).gather(2, candidates))
        counts = torch.randint(0, k + 1, (batch,), generator=draft.random)
        return DraftedTokens.picked_from(candidates, picked, probabilities, counts)

    def follow(
        self, states: torch.Tensor, drafted: DraftedTokens, accepted: torch.Tensor, own: torch.Tensor, lengths: Any
    ) -> None:
        assert states.shape == (len(self._texts), drafted.ids.shape[1] + 1, self._width)
        assert bool((accepted <= drafted.proposed).all())
        for text, ids, count, last in zip(
            self._texts, drafted.ids.tolist(), accepted.tolist(), own.tolist(), strict=True
        ):
            text.extend([*ids[:count], last])

    def select(self, rows: torch.Tensor) -> None:
        self._texts = [self._texts[row] for row in rows.tolist()]


class BlockMethod:
    """As much of a `DraftMethod` as a decoding asks for."""

    title = "Block"

    def most_draft_tokens(self, config: Any) -> int:
        return int(config.block)

    def drafter(self, *arguments: Any) -> BlockDrafter:
        return BlockDrafter(*arguments)


@torch.no_grad()
def greedy(target: PreTrainedModel, prompt: list[int], new_tokens: int) -> list[int]:
    """Plain greedy decoding by transformers itself: another implementation than ours."""
    ids = torch.tensor([prompt])
    out = target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()
