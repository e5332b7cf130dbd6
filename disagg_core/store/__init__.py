"""The data plane: the Mooncake feature store and its processes.

Names are loaded when they are first used: an owner process and the command line need neither torch nor the client.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disagg_core.store.library import require_mooncake
    from disagg_core.store.master import StoreHealth
    from disagg_core.store.mooncake import MooncakeFeatureStore
    from disagg_core.store.references import NewSample
    from disagg_core.store.services import StoreServices, managed_store, probe_store, running_store

_HOMES = {
    "MooncakeFeatureStore": "mooncake",
    "NewSample": "references",
    "StoreHealth": "master",
    "StoreServices": "services",
    "managed_store": "services",
    "probe_store": "services",
    "require_mooncake": "library",
    "running_store": "services",
}

__all__ = [
    "MooncakeFeatureStore",
    "NewSample",
    "StoreHealth",
    "StoreServices",
    "managed_store",
    "probe_store",
    "require_mooncake",
    "running_store",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
