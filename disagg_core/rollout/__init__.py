"""The producer's side: prompts, leases, targets, capture workers and the drive loop.

Names are loaded when they are first used: checking prompts needs no torch model, and a server's plugin no worker.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disagg_core.engines.contract import Target
    from disagg_core.engines.servers.target import SGLangTarget
    from disagg_core.engines.transformers import TransformersTarget
    from disagg_core.rollout.producer import Drive, build_disagg_online_producer
    from disagg_core.rollout.prompt_source import PromptSource
    from disagg_core.rollout.worker import RolloutWorker

_HOMES = {
    "Drive": "rollout.producer",
    "PromptSource": "rollout.prompt_source",
    "RolloutWorker": "rollout.worker",
    "SGLangTarget": "engines.servers.target",
    "Target": "engines.contract",
    "TransformersTarget": "engines.transformers",
    "build_disagg_online_producer": "rollout.producer",
}

__all__ = [
    "Drive",
    "PromptSource",
    "RolloutWorker",
    "SGLangTarget",
    "Target",
    "TransformersTarget",
    "build_disagg_online_producer",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"disagg_core.{_HOMES[name]}"), name)
