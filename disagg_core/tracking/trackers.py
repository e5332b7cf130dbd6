"""Which trackers a run document asks for, whether they can be had here, and how each is made."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from disagg_core.errors import BadInput, MissingLibrary
from disagg_core.run_spec.results import TrackingSection
from disagg_core.tracking.observer import RunObserver, TrackedRun

TrackerName = Literal["tensorboard", "wandb", "mlflow"]
_MLFLOW_URI = "MLFLOW_TRACKING_URI"


class TrackerRequest(BaseModel):
    """What the process that tells a tracker is given."""

    model_config = ConfigDict(frozen=True)

    tracker: TrackerName
    section: TrackingSection
    run: TrackedRun
    events: Path
    state: Path
    last_s: float
    """How long the tracker may take for what is left at the end."""


def trackers_of(section: TrackingSection) -> list[TrackerName]:
    """Return the trackers that a run document asks for."""
    asked: dict[TrackerName, bool] = {
        "tensorboard": section.tensorboard,
        "wandb": section.wandb is not None,
        "mlflow": section.mlflow is not None,
    }
    return [name for name, wanted in asked.items() if wanted]


def check_trackers(section: TrackingSection) -> None:
    """Check that what a run document asks for is installed and has an address here; nothing is asked of a server.

    Raises:
        MissingLibrary: a tracker's package is not installed; each is named.
        BadInput: MLflow has no address.
    """
    missing = [name for name in trackers_of(section) if importlib.util.find_spec(name) is None]
    if missing:
        extras = ",".join(name for name in missing if name != "tensorboard")
        way_out = f"pip install 'draftline[{extras}]'" if extras else "pip install tensorboard"
        raise MissingLibrary(
            f"tracking: expected the packages {', '.join(missing)}, found none; {way_out}, or leave them out of the "
            "document"
        )
    if section.mlflow is not None and section.mlflow.uri is None and not os.environ.get(_MLFLOW_URI):
        raise BadInput(f"tracking.mlflow: expected a uri, or {_MLFLOW_URI} in the environment, found neither")


def make_observer(name: TrackerName, section: TrackingSection) -> RunObserver:
    """Return the observer called `name`, as the document says; what it needs is imported here."""
    if name == "tensorboard":
        from disagg_core.tracking.tensorboard_files import TensorBoardObserver

        return TensorBoardObserver()
    if name == "wandb":
        from disagg_core.tracking.wandb_run import WandbObserver

        assert section.wandb is not None
        return WandbObserver(section.wandb)
    from disagg_core.tracking.mlflow_run import MlflowObserver

    assert section.mlflow is not None
    return MlflowObserver(section.mlflow)
