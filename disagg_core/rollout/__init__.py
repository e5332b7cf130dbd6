"""The producer's side: leases, capture workers and the drive loop; with the engines' targets under their public names.

Names are loaded when they are first used: a server's plugin needs no worker.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_core import lazy_names

if TYPE_CHECKING:
    from disagg_core.engines.contract import Target
    from disagg_core.engines.sglang.target import SGLangTarget
    from disagg_core.engines.transformers import TransformersTarget
    from disagg_core.rollout.producer import Drive, build_disagg_online_producer
    from disagg_core.rollout.prompt_source import PromptSource
    from disagg_core.rollout.worker import RolloutWorker

__all__ = [
    "Drive",
    "PromptSource",
    "RolloutWorker",
    "SGLangTarget",
    "Target",
    "TransformersTarget",
    "build_disagg_online_producer",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Drive": "rollout.producer",
        "PromptSource": "rollout.prompt_source",
        "RolloutWorker": "rollout.worker",
        "SGLangTarget": "engines.sglang.target",
        "Target": "engines.contract",
        "TransformersTarget": "engines.transformers",
        "build_disagg_online_producer": "rollout.producer",
    },
)
