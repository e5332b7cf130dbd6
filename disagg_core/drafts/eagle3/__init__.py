"""EAGLE-3: the draft model and its training-time-test loss."""

from disagg_core.drafts.eagle3.batch import Eagle3Batch, count_valid_positions
from disagg_core.drafts.eagle3.config import Eagle3Config
from disagg_core.drafts.eagle3.loss import Eagle3Loss, TttOutput, simulated_accept_length, training_time_test
from disagg_core.drafts.eagle3.model import DraftCache, Eagle3Draft

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
