"""``draftline channel``: looking into a reference channel from the command line."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from disagg_core.channel.inspection import ChannelInspection, Inspector, render
from disagg_core.cli.exits import stop
from disagg_core.errors import BadInput, ChannelError
from disagg_core.settings import get_settings

app = typer.Typer(no_args_is_help=True)

_EVERY_S = 1.0


@app.callback()
def channel() -> None:
    """Look into a reference channel."""


@app.command()
def inspect(
    url: Annotated[
        str, typer.Argument(help="A channel's directory, file:/dir, or redis://host:port/db[?channel=name].")
    ],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show it live until both sides are done.")] = False,
) -> None:
    """Show records, cursor, lag, claims, end state and damage. Claims and changes nothing.

    Exit status: 0 if the channel is intact, 1 if it is damaged or cannot be reached, 2 if there is none at the address.
    """
    settings = get_settings()
    try:
        inspector = Inspector(
            url, password=settings.redis_password, ca=settings.redis_ca if url.startswith("rediss:") else None
        )
        try:
            found = _follow(inspector.look) if follow else inspector.look()
        finally:
            inspector.close()
    except (BadInput, ChannelError) as error:
        stop(error)
    if not follow:
        typer.echo(render(found))
    raise typer.Exit(1 if found.damage else 0)


def _follow(look: Callable[[], ChannelInspection]) -> ChannelInspection:
    """Redraw until nothing more can happen, or the user interrupts."""
    pause = threading.Event()
    found = look()
    with Live(Text(render(found)), console=Console(soft_wrap=True), auto_refresh=False) as live:
        try:
            while not found.finished:
                pause.wait(_EVERY_S)
                found = look()
                live.update(Text(render(found)), refresh=True)
        except KeyboardInterrupt:
            return found
    return found
