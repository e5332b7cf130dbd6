"""draftline's core: the whole of online, disaggregated draft training, without an orchestrator.

Floors, imports point downwards only (`tests/unit/core/test_architecture.py` holds them)::

    cli
    roles
    training, rollout, checks, registry, tracking
    evaluation, channel, engines, report
    drafts, prompts, run
    target, store
    run_spec, processes, settings
    errors, failures, contracts, ordinals, files
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

__version__ = "0.1.0"


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """Return the ``__getattr__`` of a package whose public names are loaded when they are first used.

    What is light stays light: a plan needs no torch, an owner process no model. `homes` maps each name to the module
    below ``disagg_core`` that defines it.
    """

    def load(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{homes[name]}"), name)

    return load
