"""One optimizer step of the drafts of blocks on CPU beside the plain eager formula.

    python -m tests.benchmarks.bench_dflash [--point dflash|dflash2|dspark|all] [--rounds 5] [--threads 1]

fp32, H=256, V=4096, T=512, B=2, 64 anchors x 16 slots, 5 layers; what is measured and how: `step_cost`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from disagg_core.drafts.dflash.batch import DFlashBatch
from disagg_core.drafts.dflash.options import default_gamma
from disagg_core.drafts.dspark.model import DSparkDraft
from disagg_core.drafts.dspark.options import DSparkSection
from disagg_core.drafts.method import FrozenParts, Sample
from disagg_core.drafts.registry import method_of
from disagg_core.run_spec.draft import draft_sections
from tests.benchmarks.baselines.eager_dflash import eager_dflash
from tests.benchmarks.baselines.eager_dspark import eager_dspark
from tests.benchmarks.step_cost import Case, main, masks_of

HIDDEN, VOCAB, TOKENS, SIZE, LAYERS = 256, 4096, 512, 16, 5
WANTED = "time <= 0.7, peak <= 0.3"
OWN: dict[str, dict[str, Any]] = {
    "dflash": {},
    "dflash2": {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 256, "selector_top_k": 16},
    "dspark": {"markov_rank": 256},
}


def make(name: str, kind: str, variant: str) -> Case:
    torch.manual_seed(0)
    method = method_of(name)
    section = draft_sections()[name].model_validate({"anchors": 64, "block_size": SIZE})
    document = {
        "hidden_size": HIDDEN,
        "intermediate_size": 688,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "block_size": SIZE,
        "mask_token_id": VOCAB - 1,
        "target_layer_ids": list(range(LAYERS)),
        **OWN[name],
    }
    draft_type = type(method).draft_type
    draft = draft_type(draft_type.config_type.from_dict(document))
    parts = FrozenParts(torch.randn(VOCAB, HIDDEN), torch.randn(VOCAB, HIDDEN) * 0.05)
    draft.attach(parts)
    batcher = method.batcher(section, draft.config, seed=0)
    batch = batcher.collate([sample(number, mask) for number, mask in enumerate(masks_of(kind, TOKENS))])
    normalisers = {name: torch.tensor(value) for name, value in batcher.normalisers(batch).items()}
    if variant == "fused":
        module = method.loss(draft, parts, section, activation_checkpointing=False)
        return Case(draft.parameters(), lambda: module(batch, normalisers).total)
    if isinstance(draft, DSparkDraft):
        assert isinstance(section, DSparkSection)
        return Case(draft.parameters(), lambda: eager_dspark(draft, inputs_of(batch), section.loss))
    return Case(draft.parameters(), lambda: eager_dflash(draft, inputs_of(batch), gamma=default_gamma(SIZE)).loss)


def inputs_of(batch: DFlashBatch) -> dict[str, Tensor]:
    names = ("input_ids", "loss_mask", "hidden_states", "anchors", "block_keep", "last_hidden_state")
    return {name: getattr(batch, name) for name in names}


def sample(number: int, mask: Tensor) -> Sample:
    tensors = {
        "input_ids": torch.randint(0, VOCAB - 1, (len(mask),), dtype=torch.int32),
        "loss_mask": mask,
        "aux_hidden_states": torch.randn(len(mask), LAYERS * HIDDEN),
        "last_hidden_state": torch.randn(len(mask), HIDDEN),
    }
    return Sample(f"s{number}", tensors)


if __name__ == "__main__":
    main(
        "tests.benchmarks.bench_dflash",
        __doc__,
        {name: partial(make, name) for name in OWN},
        dict.fromkeys(OWN, WANTED),
    )
