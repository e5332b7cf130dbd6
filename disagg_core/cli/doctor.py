"""``draftline doctor``: is this machine, and are these SGLang servers, fit for a run?"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from disagg_core.cli.exits import stop
from disagg_core.errors import BadInput, DraftlineError
from disagg_core.run_spec.document import TargetSection
from disagg_core.run_spec.draft import DraftSection, default_draft
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import get_settings

_MARKS = {"ok": "[green]ok[/]     ", "warning": "[yellow]warning[/]", "failed": "[red]failed[/] "}


def doctor(
    spec: Annotated[
        Path | None, typer.Argument(help="Run document whose target and servers are probed.", show_default=False)
    ] = None,
    server: Annotated[list[str] | None, typer.Option("--server", help="URL of an SGLang server to probe.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The model that the servers should run.")] = None,
    start_server: Annotated[
        bool, typer.Option("--start-server", help="Start one server as a run would, probe it and stop it.")
    ] = False,
    machine: Annotated[bool, typer.Option("--machine/--no-machine", help="Check this machine too.")] = True,
) -> None:
    """Check this machine; probe SGLang servers: version, capture, layers against transformers, memory.

    Exit status: 0 if a run would work, 1 if a check failed, 2 if what was given is wrong.
    """
    console = Console(soft_wrap=True, highlight=False)
    try:
        probed = _target(spec, server or [], model, start_server)
        failed = _report(console, _machine()) if machine else 0
        if probed is not None:
            failed += _probe(console, *probed, start_server)
    except DraftlineError as error:
        stop(error)
    if failed:
        console.print(f"[red]{failed} check{'s' if failed > 1 else ''} failed[/]")
        raise typer.Exit(1)


def _target(
    spec: Path | None, servers: list[str], model: str | None, start_server: bool
) -> tuple[TargetSection, tuple[DraftSection, ...]] | None:
    """Return the target to probe servers for, and the drafts it is captured for; None to check the machine only."""
    drafts: tuple[DraftSection, ...] = (default_draft(),)
    if spec is not None:
        document = load_spec(spec, ())
        section, drafts = document.target, document.all_drafts
        if model is not None:
            raise BadInput("give either a run document or --model, not both")
    elif model is not None:
        section = TargetSection(model=model, backend="sglang")
    elif servers or start_server:
        raise BadInput("to probe a server, say what it should run: a run document, or --model")
    else:
        return None
    if servers:
        section = section.model_copy(update={"server_urls": tuple(servers)})
    return (section, drafts) if section.server_urls or start_server else None


def _machine() -> Iterator[tuple[str, str, str]]:
    from disagg_core.checks.doctor import machine_findings

    for finding in machine_findings(get_settings()):
        yield finding.level, finding.what, finding.found


def _probe(console: Console, section: TargetSection, drafts: tuple[DraftSection, ...], start_server: bool) -> int:
    from disagg_core.checks.doctor import server_findings, started_server
    from disagg_core.drafts.together import capture_of
    from disagg_core.engines.sglang.client import SglangClient
    from disagg_core.target.facts import read_target_facts

    facts = read_target_facts(section)
    capture = capture_of(drafts, section, facts)
    failed = 0
    with contextlib.ExitStack() as stack:
        clients = []
        for url in section.server_urls:
            client = SglangClient(url, url, timeout_s=section.request_timeout_s)
            stack.callback(client.close)
            clients.append(client)
        if start_server:
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="draftline-doctor-")))
            console.print(f"starting a server for {escape(facts.model)}; this takes a minute or more")
            clients.append(stack.enter_context(started_server(section, facts, capture, get_settings(), logs)))
        for client in clients:
            console.print(f"\n{escape(client.name)}")
            findings = server_findings(client, section, facts, capture)
            failed += _report(console, ((entry.level, entry.what, entry.found) for entry in findings))
    return failed


def _report(console: Console, findings: Iterable[tuple[str, str, str]]) -> int:
    """Print each finding as it comes; return how many failed."""
    failed = 0
    for level, what, found in findings:
        console.print(f"{_MARKS[level]} {escape(what)}: {escape(found)}")
        failed += level == "failed"
    return failed
