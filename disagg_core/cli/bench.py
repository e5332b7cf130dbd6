"""``draftline bench``: how fast the parts of a run are on this machine, each beside a baseline in the same run."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from disagg_core.cli.tables import wide_console
from disagg_core.files import write_atomically
from disagg_core.run_spec.draft import DEFAULT_METHOD

if TYPE_CHECKING:
    from disagg_core.bench.result import Result


class Part(StrEnum):
    """What can be measured."""

    CHANNEL = "channel"
    STORE = "store"
    DRAFT = "draft"
    LOADER = "loader"
    PIPELINE = "pipeline"
    ALL = "all"


def bench(
    part: Annotated[Part, typer.Argument(help="What to measure.", show_default=False)],
    method: Annotated[str, typer.Option(help="Draft method of draft, loader and pipeline.")] = DEFAULT_METHOD,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one process.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds: no figures to quote.")] = False,
    idle: Annotated[
        bool, typer.Option("--idle", help="pipeline: capture takes time only, as on a GPU; not a core of its own.")
    ] = False,
    run: Annotated[
        Path | None,
        typer.Option("--run", metavar="FILE", help="pipeline: with target, prompts and drafts of this run document."),
    ] = None,
    document: Annotated[Path | None, typer.Option("--json", help="Write figures and machine facts here, too.")] = None,
) -> None:
    """Measure the parts of a run on this machine; every figure stands beside a baseline of the same run.

    Needs no model (but with --run), no GPU and no checkout. Exit code 0 whatever is found: bounds are shown as kept or
    missed.
    """
    if run is not None and (idle or part not in (Part.PIPELINE, Part.ALL)):
        raise typer.BadParameter(f"is for pipeline without --idle, found {part}{' --idle' * idle}", param_hint="--run")
    import torch

    from disagg_core.bench.result import as_document, as_table, machine

    torch.set_num_threads(threads)
    console = wide_console()
    results: list[Result] = []
    facts = machine()
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
    measures = _measures(method, quick=quick, idle=idle, run=run)
    for name in measures if part is Part.ALL else [part]:
        results.append(measures[name]())
        console.print(as_table(results[-1]))
    if document is not None:
        write_atomically(document, json.dumps(as_document(results, facts), indent=2))


def _measures(method: str, *, quick: bool, idle: bool, run: Path | None) -> dict[Part, Callable[[], Result]]:
    """Return what measures each part."""

    def channel() -> Result:
        from disagg_core.bench.channel import bench_channel

        return bench_channel(refs=5_000 if quick else 50_000)

    def store() -> Result:
        from disagg_core.bench.store import bench_store

        return bench_store(samples=12, rounds=2, sizes=(1, 4), streamed=1) if quick else bench_store()

    def draft() -> Result:
        from disagg_core.bench.draft import bench_draft
        from disagg_core.bench.scene import SMALL, TINY

        return bench_draft(method, TINY, tokens=64, steps=2) if quick else bench_draft(method, SMALL)

    def loader() -> Result:
        from disagg_core.bench.loader import bench_loader

        return bench_loader(megabytes=2, step_s=0.02, steps=5, method=method) if quick else bench_loader(method=method)

    def pipeline() -> Result:
        from disagg_core.bench.pipeline import Cost, PipelineSetting, bench_pipeline
        from disagg_core.bench.run_pair import bench_run
        from disagg_core.bench.scene import TINY

        if run is not None:
            return bench_run(run, samples=48) if quick else bench_run(run)
        cost: Cost = "time" if idle else "processor"
        if quick:
            return bench_pipeline(PipelineSetting(method, TINY, tokens=32, samples=48, batch=4, cost=cost))
        return bench_pipeline(PipelineSetting(method, cost=cost))

    return {
        Part.CHANNEL: channel,
        Part.STORE: store,
        Part.DRAFT: draft,
        Part.LOADER: loader,
        Part.PIPELINE: pipeline,
    }
