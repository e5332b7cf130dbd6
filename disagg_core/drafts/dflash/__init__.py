"""DFlash: the draft model, its loss over blocks, and its drafter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_core import lazy_names

if TYPE_CHECKING:
    from disagg_core.drafts.dflash.batch import DFlashBatch
    from disagg_core.drafts.dflash.config import DFlashConfig
    from disagg_core.drafts.dflash.drafter import BlockDrafter
    from disagg_core.drafts.dflash.loss import DFlashLoss, DFlashOutput, dflash_loss
    from disagg_core.drafts.dflash.model import DFlashDraft

__all__ = ["BlockDrafter", "DFlashBatch", "DFlashConfig", "DFlashDraft", "DFlashLoss", "DFlashOutput", "dflash_loss"]

__getattr__ = lazy_names(
    __name__,
    {
        "BlockDrafter": "drafts.dflash.drafter",
        "DFlashBatch": "drafts.dflash.batch",
        "DFlashConfig": "drafts.dflash.config",
        "DFlashDraft": "drafts.dflash.model",
        "DFlashLoss": "drafts.dflash.loss",
        "DFlashOutput": "drafts.dflash.loss",
        "dflash_loss": "drafts.dflash.loss",
    },
)
