"""``draftline data``: looking at prompts before they are trained on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.yaml_file import load_spec, parse_spec, with_overrides

if TYPE_CHECKING:
    from disagg_core.prompts.bad_records import Refusals
    from disagg_core.prompts.inspection import Inspection, Run

app = typer.Typer(help="Look at prompts.", no_args_is_help=True)

_OPEN, _CLOSE = "⟦", "⟧"
_WIDTH_IN_A_PIPE = 140
_LONGEST_SAMPLE = 4000


@app.callback()
def data() -> None:
    """Look at prompts."""


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(help="A file or folder of prompts, or hf:NAME[:SPLIT].", show_default=False)],
    run: Annotated[Path | None, typer.Option("--run", help="Run document whose target and data section count.")] = None,
    target: Annotated[
        str | None, typer.Option("--target", "--tokenizer", help="Model (or directory) whose tokenizer is used.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="As in a run, such as data.fields={prompt: question}."),
    ] = None,
) -> None:
    """Show format, counts, lengths, what a run would reject and why, and one sample with what is trained on.

    Exit status: 0 if prompts were found, 2 if the file cannot be used.
    """
    from disagg_core.prompts.inspection import inspect_prompts
    from disagg_core.target.tokenizer import load_tokenizer

    spec = _spec(file, run, target, overrides or ())
    tokenizer = load_tokenizer(spec.target) if run is not None or target is not None else None
    found = inspect_prompts(spec, tokenizer)
    console = Console(width=None if sys.stdout.isatty() else _WIDTH_IN_A_PIPE, highlight=False)
    for part in render(found, spec, colour=console.is_terminal):
        console.print(part, soft_wrap=isinstance(part, Text))


def _spec(file: str, run: Path | None, target: str | None, overrides: Sequence[str]) -> RunSpec:
    if run is not None:
        spec = load_spec(run, overrides)
    else:
        document: dict[str, Any] = {"target": {"model": target or "./none"}, "data": {"prompts": file}}
        spec = parse_spec(with_overrides(document, overrides), source="--set")
    prompts = spec.data.model_copy(update={"prompts": file})
    model = spec.target if target is None else spec.target.model_copy(update={"model": target})
    return spec.model_copy(update={"data": prompts, "target": model})


def render(found: Inspection, spec: RunSpec, *, colour: bool) -> list[Table | Text]:
    """Return the parts of what ``data inspect`` prints; without `colour` what is trained on stands between ⟦ and ⟧."""
    parts: list[Table | Text] = [_counts(found, spec), _lengths(found)]
    if found.bad.count:
        parts.append(_refusals(f"{found.bad.count} records cannot be used", found.bad))
    if found.refused.count:
        parts.append(_refusals(f"{found.refused.count} of {found.encoded} encoded would be rejected", found.refused))
    allowed = spec.data.max_bad_records
    if found.bad.count and (spec.data.on_bad_record == "fail" or found.bad.count > allowed * found.records):
        setting = (
            "data.on_bad_record: fail" if spec.data.on_bad_record == "fail" else f"data.max_bad_records: {allowed:g}"
        )
        parts.append(Text(f"a run would refuse these prompts ({setting})", style="bold red"))
    return [*parts, *_sample(found.sample, found.sample_source, found.encoded > 0, colour)]


def _counts(found: Inspection, spec: RunSpec) -> Table:
    table = Table(show_header=False, title=found.source, title_justify="left")
    table.add_column(style="dim")
    table.add_column()
    table.add_row("format", ", ".join(f"{name} ({count})" for name, count in found.formats.most_common()))
    looked = "" if found.whole else ", the first of a stream"
    table.add_row("records", f"{found.records} = {found.usable} usable + {found.bad.count} bad{looked}")
    table.add_row("copies of another", str(found.copies))
    table.add_row("ask the same as another", str(found.same_questions))
    if found.encoded:
        table.add_row("encoded", f"{found.encoded} = {len(found.tokens)} trained on + {found.refused.count} rejected")
        table.add_row(f"as long as data.max_tokens ({spec.data.max_tokens})", str(found.truncated))
    return table


def _lengths(found: Inspection) -> Table:
    from disagg_core.prompts.inspection import QUANTILES, quantiles

    names = {0.0: "least", 0.5: "median", 1.0: "most"}
    table = Table("a record", *(names.get(q, f"{q:.0%}") for q in QUANTILES), title="lengths", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {"messages": found.turns, "characters": found.characters, "tokens": found.tokens, "trained": found.trained}
    for name, lengths in rows.items():
        if lengths:
            table.add_row(name, *map(str, quantiles(lengths)))
    return table


def _refusals(title: str, refused: Refusals) -> Table:
    table = Table("count", "reason", "where", title=title, title_justify="left")
    for reason in sorted(refused.reasons.values(), key=lambda reason: -reason.count):
        more = ", …" if reason.count > len(reason.places) else ""
        table.add_row(str(reason.count), Text(reason.example), ", ".join(reason.places) + more)
    return table


def _sample(runs: Sequence[Run], source: str, masked: bool, colour: bool) -> list[Text]:
    if not runs:
        return []
    trained = "in green" if colour else f"between {_OPEN} and {_CLOSE}"
    what = f", what is trained on {trained}" if masked else " (no tokenizer given, so nothing is rendered)"
    text = Text()
    for piece, live in runs:
        if colour:
            text.append(piece, style="bold green" if live else "dim")
        else:
            text.append(f"{_OPEN}{piece}{_CLOSE}" if live else piece)
    if len(text) > _LONGEST_SAMPLE:
        text.truncate(_LONGEST_SAMPLE, overflow="ellipsis")
    return [Text(f"the record at {source}{what}:", style="bold"), text]
