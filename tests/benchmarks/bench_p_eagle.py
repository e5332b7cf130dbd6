"""One optimizer step of the P-EAGLE draft on CPU beside the plain eager formula.

    python -m tests.benchmarks.bench_p_eagle [--rounds 5] [--threads 1]

fp32, H=256, V=4096 (the draft's vocabulary too), T=512, B=2, 4 layers, 8 depths. The eager formula takes one packed row
of both samples, with a dense mask over all rows and the logits of all of them. What is measured and how: `step_cost`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from disagg_core.drafts.method import FrozenParts, Sample
from disagg_core.drafts.p_eagle.batch import PEagleBatch, PEagleBatcher
from disagg_core.drafts.p_eagle.config import PEagleConfig
from disagg_core.drafts.p_eagle.loss import PEagleLoss
from disagg_core.drafts.p_eagle.model import PEagleDraft
from disagg_core.drafts.p_eagle.options import PEagleSection
from tests.benchmarks.baselines.eager_p_eagle import eager_p_eagle
from tests.benchmarks.step_cost import Case, main, masks_of

HIDDEN, VOCAB, TOKENS = 256, 4096, 512
OPTIONS = PEagleSection(mask_token_id=VOCAB - 1)
WANTED = "time <= 0.7, peak <= 0.3"


def make(kind: str, variant: str) -> Case:
    torch.manual_seed(0)
    config = PEagleConfig.from_dict(
        {
            "hidden_size": HIDDEN,
            "intermediate_size": 688,
            "num_hidden_layers": OPTIONS.num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": VOCAB,
            "max_position_embeddings": 2048,
            "depths": OPTIONS.depths,
            "mask_token_id": OPTIONS.mask_token_id,
        }
    )
    draft = PEagleDraft(config)
    parts = FrozenParts(torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN) * 0.05)
    draft.attach(parts)
    batcher = PEagleBatcher(OPTIONS, config, seed=0)
    batch = make_batch(batcher, kind)
    if variant == "eager":
        return Case(draft.parameters(), lambda: eager_p_eagle(draft, packed(batch, parts.lm_head)).loss)
    normalisers = {name: torch.tensor(value) for name, value in batcher.normalisers(batch).items()}
    fused = PEagleLoss(draft, parts.lm_head)
    return Case(draft.parameters(), lambda: fused(batch, normalisers).total)


def packed(batch: PEagleBatch, lm_head: Tensor) -> dict[str, Tensor]:
    """Both samples in one packed row, without padding."""
    lengths = [int((batch.depths[batch.samples == row] == 0).sum()) for row in range(len(batch.mask))]
    start = torch.tensor([0, *lengths[:-1]]).cumsum(0)

    def joined(x: Tensor) -> Tensor:
        return torch.cat([x[row, :length] for row, length in enumerate(lengths)])[None]

    return {
        "input_ids": joined(batch.input_ids),
        "loss_mask": joined(batch.mask),
        "hidden_states": joined(batch.hidden_states),
        "target_logits": joined(batch.teacher) @ lm_head.T,
        "lengths": torch.tensor(lengths),
        "anchor_pos": batch.anchors + start[batch.samples],
        "depth": batch.depths,
    }


def make_batch(batcher: PEagleBatcher, kind: str) -> PEagleBatch:
    samples = []
    for number, mask in enumerate(masks_of(kind, TOKENS)):
        tensors = {
            "input_ids": torch.randint(0, VOCAB - 1, (len(mask),), dtype=torch.int32),
            "loss_mask": mask,
            "aux_hidden_states": torch.randn(len(mask), 3 * HIDDEN),
            "last_hidden_state": torch.randn(len(mask), HIDDEN),
        }
        samples.append(Sample(f"s{number}", tensors))
    return batcher.collate(samples)


if __name__ == "__main__":
    main("tests.benchmarks.bench_p_eagle", __doc__, {"p_eagle": make}, {"p_eagle": WANTED})
