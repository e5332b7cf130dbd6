"""The consumer side: references and samples in, trained drafts and checkpoints out."""

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
