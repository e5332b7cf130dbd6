"""EAGLE-3: the draft model and its training-time-test loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_core import lazy_names

if TYPE_CHECKING:
    from disagg_core.drafts.eagle3.batch import Eagle3Batch, count_valid_positions
    from disagg_core.drafts.eagle3.config import Eagle3Config
    from disagg_core.drafts.eagle3.loss import Eagle3Loss, TttOutput, training_time_test
    from disagg_core.drafts.eagle3.model import DraftCache, Eagle3Draft
    from disagg_core.drafts.simulated import simulated_accept_length

__all__ = [
    "DraftCache",
    "Eagle3Batch",
    "Eagle3Config",
    "Eagle3Draft",
    "Eagle3Loss",
    "TttOutput",
    "count_valid_positions",
    "simulated_accept_length",
    "training_time_test",
]

__getattr__ = lazy_names(
    __name__,
    {
        "DraftCache": "drafts.eagle3.model",
        "Eagle3Batch": "drafts.eagle3.batch",
        "Eagle3Config": "drafts.eagle3.config",
        "Eagle3Draft": "drafts.eagle3.model",
        "Eagle3Loss": "drafts.eagle3.loss",
        "TttOutput": "drafts.eagle3.loss",
        "count_valid_positions": "drafts.eagle3.batch",
        "simulated_accept_length": "drafts.simulated",
        "training_time_test": "drafts.eagle3.loss",
    },
)
