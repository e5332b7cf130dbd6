"""Small DFlash2 drafts for the tests."""

from __future__ import annotations

import torch

from disagg_core.drafts.dflash2.config import DFlash2Config
from disagg_core.drafts.dflash2.model import DFlash2Draft
from tests.unit.drafts.dflash.cases import filled, small_config, target_parts

SIZES: dict[str, object] = {
    "conv_kernel_size": 2,
    "conv_group_size": 4,
    "selector_rank": 5,
    "selector_top_k": 6,
}


def small_config2(**changes: object) -> DFlash2Config:
    return small_config(DFlash2Config, **{**SIZES, **changes})


def small_draft2(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> DFlash2Draft:
    """A draft all of whose parts have weights, convolutions and selector included."""
    draft = filled(DFlash2Draft(small_config2(**changes)), seed).to(dtype)
    draft.attach(target_parts(draft.config, dtype))
    return draft
