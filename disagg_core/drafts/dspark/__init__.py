"""DSpark: the draft model with its Markov and confidence heads, its loss, and its drafter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_core import lazy_names

if TYPE_CHECKING:
    from disagg_core.drafts.dspark.config import DSparkConfig
    from disagg_core.drafts.dspark.drafter import WalkingDrafter
    from disagg_core.drafts.dspark.loss import DSparkLoss
    from disagg_core.drafts.dspark.model import DSparkDraft
    from disagg_core.drafts.dspark.outputs import DSparkOutput, dspark_loss

__all__ = ["DSparkConfig", "DSparkDraft", "DSparkLoss", "DSparkOutput", "WalkingDrafter", "dspark_loss"]

__getattr__ = lazy_names(
    __name__,
    {
        "DSparkConfig": "drafts.dspark.config",
        "DSparkDraft": "drafts.dspark.model",
        "DSparkLoss": "drafts.dspark.loss",
        "DSparkOutput": "drafts.dspark.outputs",
        "WalkingDrafter": "drafts.dspark.drafter",
        "dspark_loss": "drafts.dspark.outputs",
    },
)
