"""EAGLE-3: the draft model and its training-time-test loss."""

from disagg_core.drafts.eagle3.config import Eagle3Config
from disagg_core.drafts.eagle3.model import DraftCache, Eagle3Draft

__all__ = ["DraftCache", "Eagle3Config", "Eagle3Draft"]
