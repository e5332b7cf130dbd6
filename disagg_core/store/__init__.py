"""The data plane: the Mooncake feature store and its processes.

Names are loaded when they are first used: an owner process and the command line need neither torch nor the client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_core import lazy_names

if TYPE_CHECKING:
    from disagg_core.store.library import require_mooncake
    from disagg_core.store.master import StoreHealth
    from disagg_core.store.mooncake import MooncakeFeatureStore
    from disagg_core.store.references import NewSample
    from disagg_core.store.sample_probe import round_trip
    from disagg_core.store.services import StoreServices, managed_store, probe_store, running_store

_HOMES = {
    "MooncakeFeatureStore": "store.mooncake",
    "NewSample": "store.references",
    "StoreHealth": "store.master",
    "StoreServices": "store.services",
    "managed_store": "store.services",
    "probe_store": "store.services",
    "require_mooncake": "store.library",
    "round_trip": "store.sample_probe",
    "running_store": "store.services",
}

__all__ = [
    "MooncakeFeatureStore",
    "NewSample",
    "StoreHealth",
    "StoreServices",
    "managed_store",
    "probe_store",
    "require_mooncake",
    "round_trip",
    "running_store",
]

__getattr__ = lazy_names(__name__, _HOMES)
