"""``draftline store``: look at a running feature store."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from disagg_core.cli.exits import stop
from disagg_core.errors import BadInput, StoreUnavailable
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.store.master import MasterView, Segment, StoreHealth, wait_for_port

app = typer.Typer(help="The feature store.", no_args_is_help=True)

REACHABLE_S = 2.0


@app.callback()
def store() -> None:
    """The feature store."""


@app.command()
def status(
    master: Annotated[str, typer.Option(help="host:port of the Mooncake master.")],
    metrics: Annotated[str, typer.Option(help="host:port of the master's metrics.")],
) -> None:
    """Show capacity, use, keys by run, and evictions; exit with 2 when the store cannot be reached."""
    try:
        view = MasterView(StoreEndpoints(master_address=master, metrics_address=metrics))
        wait_for_port(master, REACHABLE_S, "--master")
        health, segments, runs = view.health(), view.segments(), view.keys_by_run()
    except (BadInput, StoreUnavailable) as error:
        stop(error, 2)
    console = Console()
    console.print(_usage(master, health, segments))
    console.print(_runs(runs))


def _usage(master: str, health: StoreHealth, segments: list[Segment]) -> Table:
    table = Table("store", "capacity", "used", "%", "state", title=f"feature store at {master}")
    for segment in segments:
        table.add_row(segment.name, *_sizes(segment.used_bytes, segment.size_bytes), segment.status)
    evicted = "nothing evicted" if health.evicted == 0 else f"[red]{health.evicted} objects evicted[/red]"
    table.add_section()
    table.add_row(f"{len(segments)} owners", *_sizes(health.used_bytes, health.total_bytes), evicted)
    return table


def _runs(runs: dict[str, int]) -> Table:
    table = Table("run/attempt", "keys", title=f"{sum(runs.values())} keys")
    for run in sorted(runs):
        table.add_row(run, str(runs[run]))
    return table


def _sizes(used: int, total: int) -> tuple[str, str, str]:
    share = f"{100 * used / total:.1f}" if total else "-"
    return f"{total / 2**20:,.0f} MiB", f"{used / 2**20:,.1f} MiB", share
