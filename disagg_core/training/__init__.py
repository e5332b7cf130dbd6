"""The consumer side: references and samples in, trained drafts and checkpoints out.

Names are loaded when they are first used: who reads a checkpoint needs no trainer, which takes seconds to load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_core import lazy_names

if TYPE_CHECKING:
    from disagg_core.training.consumer import DraftToTrain, build_disagg_online_consumer
    from disagg_core.training.loader import FeatureDataLoader
    from disagg_core.training.progress import TrainOutcome
    from disagg_core.training.trainer import Trainer
    from disagg_core.training.window import TrainingWindow

__all__ = [
    "DraftToTrain",
    "FeatureDataLoader",
    "TrainOutcome",
    "Trainer",
    "TrainingWindow",
    "build_disagg_online_consumer",
]

__getattr__ = lazy_names(
    __name__,
    {
        "DraftToTrain": "training.consumer",
        "FeatureDataLoader": "training.loader",
        "TrainOutcome": "training.progress",
        "Trainer": "training.trainer",
        "TrainingWindow": "training.window",
        "build_disagg_online_consumer": "training.consumer",
    },
)
