"""``draftline regenerate``: have the target continue a run's prompts once and write them as a data set."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.yaml_file import load_spec

if TYPE_CHECKING:
    from disagg_core.engines.contract import Target
    from disagg_core.target.facts import TargetFacts

_STORE_BYTES = 256 * 1024**2


def regenerate(
    spec: Annotated[Path, typer.Argument(help="Run document (YAML) with a data.generate section.")],
    out: Annotated[Path, typer.Option("--out", help="JSONL file to write; an interrupted one is continued.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value of the document.")
    ] = None,
) -> None:
    """Let the target continue the prompts and write prompt and continuation as pretokenised training data."""
    from disagg_core.prompts.checks import validate_prompts
    from disagg_core.rollout.regenerate import regenerate as write_continuations
    from disagg_core.target.facts import read_target_facts

    document = load_spec(spec, overrides or ())
    facts = read_target_facts(document.target)
    validate_prompts(document, None, facts)
    console = Console(stderr=True)
    with _target(document, facts) as target, _progress(console) as progress:
        bar = progress.add_task("continuations", total=None)
        done = write_continuations(
            document,
            facts,
            target,
            out,
            progress=lambda lines, total: progress.update(bar, completed=lines, total=total),
        )
    console.print(f"{out}: {done.before} lines before, {done.written} written, {done.rejected} prompts rejected")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )


@contextlib.contextmanager
def _target(spec: RunSpec, facts: TargetFacts) -> Iterator[Target]:
    """Yield the target of a run document. SGLang's plugin wants a store to write to, so it gets a small one."""
    import torch

    from disagg_core.drafts.together import capture_of
    from disagg_core.engines.registry import target_of
    from disagg_core.settings import get_settings

    if spec.target.cpu_threads is not None:
        torch.set_num_threads(spec.target.cpu_threads)
    with contextlib.ExitStack() as stack:
        store, log_dir = None, Path()
        if spec.target.backend == "sglang":
            from disagg_core.store import MooncakeFeatureStore, managed_store

            log_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="draftline-")))
            host = get_settings().host
            endpoints = stack.enter_context(managed_store(_STORE_BYTES, host=host, log_dir=log_dir))
            store = stack.enter_context(MooncakeFeatureStore(endpoints, namespace="regenerate/1", host=host))
        capture = capture_of(spec.all_drafts, spec.target, facts)
        target = target_of(spec, facts, capture, store=store, log_dir=log_dir)
        stack.callback(target.close)
        yield target
