"""Tiny random targets, untrained drafts for them, and a draft that knows what the target will say."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from disagg_core.drafts.eagle3 import DraftCache, Eagle3Config, Eagle3Draft
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


@torch.no_grad()
def greedy(target: PreTrainedModel, prompt: list[int], new_tokens: int) -> list[int]:
    """Plain greedy decoding by transformers itself: another implementation than ours."""
    ids = torch.tensor([prompt])
    out = target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
    )
    return out[0, len(prompt) :].tolist()
