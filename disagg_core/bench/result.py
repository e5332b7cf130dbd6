"""What a benchmark found: figures beside their baselines, with the facts of the machine, as a table and as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One figure: its value in `unit`, and its ratio to what was measured beside it, the `baseline`.

    `wanted` is the bound that the project sets itself, in words, and `kept` whether the figure is within it.
    """

    what: str
    value: float
    unit: str
    ratio: float | None = None
    baseline: str = ""
    wanted: str = ""
    kept: bool | None = None


@dataclass(frozen=True)
class Result:
    """The figures of one benchmark and what it was run with."""

    name: str
    setting: str
    figures: list[Figure]


def machine() -> dict[str, str | int | float]:
    """Return what a figure means nothing without: processor, GPU, memory, versions, and how busy the machine is."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu,
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "draftline": _version("draftline"),
        "load": round(os.getloadavg()[0], 2),
    }


def as_table(result: Result) -> Table:
    """Return the table of a result."""
    table = Table(
        "figure", "value", "ratio", "beside", "wanted", title=f"{result.name}: {result.setting}", title_justify="left"
    )
    for figure in result.figures:
        mark = {None: "", True: " (kept)", False: " (missed)"}[figure.kept]
        ratio = "" if figure.ratio is None else f"{figure.ratio:.3g}"
        value = f"{figure.value:,.4g} {figure.unit}".strip()
        table.add_row(figure.what, value, ratio, figure.baseline, f"{figure.wanted}{mark}")
    return table


def as_document(results: Sequence[Result], facts: dict[str, Any]) -> dict[str, Any]:
    """Return the results as a JSON document."""
    return {"machine": facts, "results": [asdict(result) for result in results]}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
