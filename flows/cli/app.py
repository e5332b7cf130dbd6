"""The ``draftline`` command: the local platform, runs on it, and tools for people who look after them.

Exit codes: 0 done, 1 a run or a check failed, 2 something in the input is wrong (nothing was started), 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from disagg_core.cli.archive import app as archive_app
from disagg_core.cli.archive import diff, files_of_run
from disagg_core.cli.bench import bench
from disagg_core.cli.channel import app as channel_app
from disagg_core.cli.data import app as data_app
from disagg_core.cli.doctor import doctor
from disagg_core.cli.drafts import evaluate, export
from disagg_core.cli.exits import DEBUG, stop, take_debug
from disagg_core.cli.registry import app as drafts_app
from disagg_core.cli.rollout import regenerate
from disagg_core.cli.store import app as store_app
from disagg_core.errors import BadInput, DraftlineError
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import get_settings
from flows.cli.approval import approve, reject

app = typer.Typer(
    name="draftline",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(archive_app, name="archive", help="Check, fetch and tidy up the archives of runs.")
app.add_typer(channel_app, name="channel", help="Look into a reference channel.")
app.add_typer(data_app, name="data", help="Look at prompts before they are trained on.")
app.add_typer(drafts_app, name="drafts", help="The versions of a target's draft, and which of them is the champion.")
app.add_typer(store_app, name="store", help="Look into a feature store.")
app.command(name="doctor")(doctor)
app.command(name="bench")(bench)
app.command(name="regenerate")(regenerate)
app.command(name="export")(export)
app.command(name="evaluate")(evaluate)
app.command(name="diff")(diff)
drafts_app.command(name="approve")(approve)
drafts_app.command(name="reject")(reject)

SpecFile = Annotated[Path, typer.Argument(help="Run document (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value of the document.")
]

_WIDTH_IN_A_PIPE = 140
_console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _WIDTH_IN_A_PIPE)


def _output() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDTH_IN_A_PIPE)


def _say(message: str) -> None:
    _console.print(message)


@app.callback()
def draftline(
    debug: Annotated[bool, typer.Option(DEBUG, help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Online, disaggregated training of speculative-decoding draft models."""


@app.command()
def up() -> None:
    """Start the local platform: Prefect server, work pools, workers, deployments. Idempotent."""
    from flows.platform import local

    with local.exclusive(get_settings()):
        platform = local.up(get_settings(), _say, keep=True)
    _say(f"Prefect UI: {platform.ui_url}")
    _say(f"for the prefect command: export PREFECT_API_URL={platform.api_url}")


@app.command()
def down() -> None:
    """Cancel what runs and stop the local platform. The history of the runs is kept."""
    from flows.platform import local

    _say("stopped" if local.down(get_settings(), _say) else "nothing was running")


@app.command()
def register(
    nightly: Annotated[
        Path | None,
        typer.Option(metavar="DOCUMENT", help="Run document of recurring training; switches its schedule on."),
    ] = None,
    cron: Annotated[str, typer.Option(help="When it runs, with --nightly.")] = "0 22 * * *",
    notify: Annotated[
        str | None,
        typer.Option(metavar="SLUG/NAME", help="Notification block that is told how runs end: slack-webhook/ops."),
    ] = None,
) -> None:
    """Register pools, deployments and automations on the Prefect server in PREFECT_API_URL. Idempotent."""
    if "PREFECT_API_URL" not in os.environ:
        raise BadInput("PREFECT_API_URL is not set: expected the URL of a Prefect server's API; `draftline up` has one")
    from flows.platform.deployments import Nightly, register

    spec = load_spec(nightly) if nightly is not None else None
    if spec is not None and spec.recurring is None:
        raise BadInput(f"{nightly}: expected a document with the section recurring, found none")
    register(Nightly(spec, cron) if spec is not None else None, notify)
    _say(f"registered on {os.environ['PREFECT_API_URL']}")


@app.command()
def status() -> None:
    """Show the local platform and its latest runs."""
    from flows.cli import status as status_view
    from flows.platform import local

    status_view.show(get_settings(), local.find_platform(get_settings()), _output())


@app.command()
def plan(
    spec: SpecFile,
    overrides: Overrides = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Forecast the speed of both sides instead.")] = False,
    gpu: Annotated[str | None, typer.Option(help="With --simulate: a100, h100 (default), h200 or b200.")] = None,
    gpus: Annotated[int | None, typer.Option(min=2, help="How many to divide; by default as the document.")] = None,
    tokens: Annotated[
        float | None, typer.Option(min=1, help="Mean tokens of a sample; default: half max_tokens.")
    ] = None,
    owners: Annotated[int | None, typer.Option(min=1, help="Store owners; by default one.")] = None,
    owner_gbs: Annotated[float | None, typer.Option(help="GB/s of one store owner.")] = None,
    network_gbs: Annotated[float | None, typer.Option(help="GB/s of one node's network.")] = None,
    capture_mfu: Annotated[float | None, typer.Option(help="Part of the peak that a prefill reaches.")] = None,
    training_mfu: Annotated[float | None, typer.Option(help="Part of the peak that a step reaches.")] = None,
    price: Annotated[float | None, typer.Option(help="Price of one GPU for an hour.")] = None,
) -> None:
    """Show what a run would start and need, checked against each other. Starts nothing, needs no weights.

    With --simulate: what each side would do on such machines, what holds it up, and the best split of the GPUs.
    """
    from disagg_core.checks.preflight import sketch_plan
    from disagg_core.cli.plan_view import render

    found = sketch_plan(load_spec(spec, overrides or ()), get_settings())
    machines = {
        "owner_gbs": owner_gbs,
        "network_gbs": network_gbs,
        "capture_mfu": capture_mfu,
        "training_mfu": training_mfu,
        "price": price,
    }
    if not simulate:
        if any(value is not None for value in (gpu, gpus, tokens, owners, *machines.values())):
            raise BadInput("--gpu, --gpus, --tokens, --owners and what describes the machines need --simulate")
        _output().print(render(found))
        return
    from disagg_core.capacity.hardware import hardware_of
    from disagg_core.cli.plan_simulation import Question, simulation_of

    hardware = hardware_of(gpu or "h100", **machines)
    _output().print(simulation_of(found, Question(hardware, gpus, tokens, owners or 1)))


@app.command()
def run(
    spec: Annotated[
        str,
        typer.Argument(
            metavar="SPEC|ARCHIVE",
            help="Run document (YAML); or a run to repeat: its archive's directory or URL, its id or the start of it.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    keep_up: Annotated[bool, typer.Option("--keep-up", help="Leave the platform running at the end.")] = False,
) -> None:
    """Run one training from its document to its report; brings up what is missing and takes it down again.

    Of an archive it runs the document again, with the draft that was continued then; a target, tokenizer or data that
    is not what it was is refused, unless something is changed with --set.
    """
    repeats = None
    if spec.endswith((".yaml", ".yml")) or Path(spec).is_file():
        wanted = load_spec(Path(spec), overrides or ())  # a mistake in it is told before torch is loaded
    else:
        from disagg_core.checks.repeat import archived_plan, repeated_spec

        known = archived_plan(files_of_run(spec))
        wanted = repeated_spec(known, overrides or ())
        repeats = None if overrides else known
    from flows.cli.run import run_training

    raise typer.Exit(run_training(wanted, get_settings(), _console, keep_up=keep_up, repeats=repeats))


def main() -> None:
    """Run the command line; turn our errors into one message and an exit code."""
    try:
        app(take_debug(sys.argv[1:]), prog_name="draftline")
    except DraftlineError as error:
        stop(error)


if __name__ == "__main__":
    main()
