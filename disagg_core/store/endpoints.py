"""Where a feature store is reached."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StoreEndpoints(BaseModel):
    """Where the feature store of an attempt is reached (host:port each)."""

    model_config = ConfigDict(frozen=True)

    master_address: str
    metrics_address: str
