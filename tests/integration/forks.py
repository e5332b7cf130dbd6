"""Processes of roles and ranks, forked from one that has imported what they import, which takes each of them seconds.

Nothing heavy is imported here: a child imports this module anew. That the roles start as programs, and ranks under
torchrun, is for the tests of whole runs and of the consumer's process to say.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from disagg_core.processes.retry import wait_until
from tests.ports import free_port

FORKS = multiprocessing.get_context("forkserver")
"""The only server of this process; what it has imported is told before its first child."""
FORKS.set_forkserver_preload(
    [
        "disagg_core.store.mooncake",
        "disagg_core.roles.producer",
        "disagg_core.roles.consumer",
        "torch._dynamo",
        "torch.profiler",
        "transformers.models.auto.modeling_auto",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
        "tests.integration.channel.peer",
    ]
)


def forked(module: str, arguments: list[str], log: Path, **environment: str) -> ForkServerProcess:
    """Return a started process that is ``python -m <module> <arguments>``; `log` gets what it says.

    It has the environment of the test that asks for it, and `environment` besides.
    """
    process = FORKS.Process(target=_play, args=(module, arguments, log, {**os.environ, **environment}))
    process.start()
    return process


def forked_ranks(module: str, arguments: list[str], logs: Sequence[Path]) -> list[ForkServerProcess]:
    """Return as many started ranks as there are `logs`, told of each other what torchrun tells those of one machine."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(logs))}
    return [
        forked(module, arguments, log, **meeting, RANK=str(rank), LOCAL_RANK=str(rank)) for rank, log in enumerate(logs)
    ]


def run_ranks(size: int, module: str, arguments: list[str], log: Path, limit_s: float = 120.0) -> None:
    """Run `size` ranks to their end, which must be a good one; all of them write into `log`."""
    ranks = forked_ranks(module, arguments, [log] * size)
    try:
        wait_until(lambda: _over([rank.exitcode for rank in ranks]), timeout_s=limit_s, every_s=0.02)
        assert [rank.exitcode for rank in ranks] == [0] * size, log.read_text()[-4000:]
    finally:
        for rank in ranks:
            end(rank)


def _over(codes: Sequence[int | None]) -> bool:
    """Whether all have ended, or one so that the others wait for it in vain."""
    return None not in codes or any(codes)


def end(process: ForkServerProcess) -> None:
    """Kill what may still run, and wait for its end."""
    process.kill()
    process.join(60)


def _play(module: str, arguments: list[str], log: Path, environment: Mapping[str, str]) -> None:
    with log.open("ab") as output:
        for standard in (1, 2):
            os.dup2(output.fileno(), standard)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")
