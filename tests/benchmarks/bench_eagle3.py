"""One optimizer step of the EAGLE-3 draft on CPU beside the plain eager formula.

    python -m tests.benchmarks.bench_eagle3 [--point narrow|wide|all] [--rounds 5] [--threads 1]

Points, fp32: narrow is H=256, V=K=4096, T=512, B=2, L=7; wide is H=256, V=128,000, K=32,000, T=1024, B=1, L=7. What is
measured and how: `step_cost`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from disagg_core.drafts.eagle3 import Eagle3Config, Eagle3Draft, Eagle3Loss
from disagg_core.drafts.eagle3.options import LossSection
from disagg_core.drafts.vocab import VocabMap
from tests.benchmarks.baselines.eager_eagle3 import eager_training_time_test
from tests.benchmarks.step_cost import Case, lengths_of, main

STEPS = 7


@dataclass(frozen=True)
class Point:
    vocab: int
    draft_vocab: int
    tokens: int
    batch: int
    hidden: int = 256


POINTS = {"narrow": Point(4096, 4096, 512, 2), "wide": Point(128_000, 32_000, 1024, 1)}
WANTED = {"narrow": "time <= 0.6, peak <= 0.5", "wide": "peak <= 0.25"}


def make(point: Point, kind: str, variant: str) -> Case:
    torch.manual_seed(0)
    config = Eagle3Config.from_dict(
        {
            "hidden_size": point.hidden,
            "intermediate_size": 688,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": point.vocab,
            "draft_vocab_size": point.draft_vocab,
            "max_position_embeddings": 2048,
        }
    )
    draft = Eagle3Draft(config)
    draft.set_embedding(torch.randn(point.vocab, point.hidden))
    if point.vocab != point.draft_vocab:
        draft.set_vocab_map(VocabMap.from_counts(torch.rand(point.vocab), point.draft_vocab))
    head = torch.randn(point.vocab, point.hidden) * 0.05
    batch = make_batch(point, kind)
    if variant == "eager":
        return Case(
            draft.parameters(),
            lambda: eager_training_time_test(draft, batch, lm_head=head, ttt_length=STEPS).total,
        )
    fused = Eagle3Loss(draft, head, LossSection(), STEPS)
    return Case(draft.parameters(), lambda: fused(batch).total)


def make_batch(point: Point, kind: str) -> dict[str, Tensor]:
    lengths = lengths_of(kind, point.tokens, point.batch)
    attention_mask = (torch.arange(point.tokens)[None] < torch.tensor(lengths)[:, None]).long()
    prompt = point.tokens * 3 // 8 if kind == "prompts" else 0
    return {
        "input_ids": torch.randint(0, point.vocab, (point.batch, point.tokens)) * attention_mask,
        "attention_mask": attention_mask,
        "loss_mask": attention_mask * (torch.arange(point.tokens)[None] >= prompt),
        "aux_hidden_states": torch.randn(point.batch, point.tokens, 3 * point.hidden),
        "last_hidden_state": torch.randn(point.batch, point.tokens, point.hidden),
    }


if __name__ == "__main__":
    makes = {name: partial(make, point) for name, point in POINTS.items()}
    main("tests.benchmarks.bench_eagle3", __doc__, makes, WANTED)
