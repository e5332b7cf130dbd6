"""Processes of roles and ranks, forked from one that has imported what they import, which takes each of them seconds.

Nothing heavy is imported here: a child imports this module anew.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "disagg_core.roles.producer",
        "disagg_core.roles.consumer",
        "torch._dynamo",
        "torch.profiler",
        "transformers.models.llama.modeling_llama",
    ]
)


def forked(module: str, arguments: list[str], log: Path, **environment: str) -> ForkServerProcess:
    """Return a started process that is ``python -m <module> <arguments>``; `log` gets what it says."""
    process = _FORKS.Process(target=_play, args=(module, arguments, log, environment))
    process.start()
    return process


def _play(module: str, arguments: list[str], log: Path, environment: Mapping[str, str]) -> None:
    with log.open("ab") as output:
        for standard in (1, 2):
            os.dup2(output.fileno(), standard)
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")
