"""What a scenario came to, as a JSON file of its own, and all of them as the table in docs/reliability.md."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict, Field

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "docs" / "reliability"
DOCUMENT = ROOT / "docs" / "reliability.md"
STANDS_STILL_S = 5.0
"""A longer pause between two steps than any of an undisturbed run."""


class Record(BaseModel):
    """One scenario. Times are in seconds, those of detection and training from the beginning of the disturbance."""

    model_config = ConfigDict(frozen=True)

    group: str
    place: int
    title: str
    end: str
    attempts: list[str]
    restarts: int
    detected_s: float | None
    detected_by: str
    still_s: float
    training_again_s: float | None
    prompts: int
    trained: int
    rejected: int
    quarantined: int
    left: list[str]
    seconds: float
    load: int | None = None
    """Processes that wanted to run, over the last five minutes; None where that was not looked at."""
    date: str = Field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%d"))
    revision: str = Field(default_factory=lambda: _revision())
    machine: str = Field(default_factory=lambda: _machine())


def write_record(record: Record, name: str) -> None:
    """Keep a record in place of an older one of its scenario, and write docs/reliability.md from all that there are."""
    RECORDS.mkdir(parents=True, exist_ok=True)
    (RECORDS / f"{name}.json").write_text(record.model_dump_json(indent=2) + "\n")
    DOCUMENT.write_text(as_markdown(read_records()))


def read_records() -> list[Record]:
    """Return the records that there are, in the order of their scenarios."""
    records = (Record.model_validate_json(path.read_bytes()) for path in RECORDS.glob("*.json"))
    return sorted(records, key=lambda record: (record.group, record.place, record.title))


def as_markdown(records: Iterable[Record]) -> str:
    """Return the document: how it was measured, and a table for each group of scenarios."""
    records = list(records)
    machines = sorted({record.machine for record in records})
    lines = [_HEAD.format(still_s=STANDS_STILL_S, machines="\n".join(f"- {machine}" for machine in machines))]
    for group in sorted({record.group for record in records}):
        lines += ["", f"## {group.partition(' ')[2].capitalize()}", "", _COLUMNS, "|" + "---|" * _COLUMNS.count("| ")]
        lines += [_row(record) for record in records if record.group == group]
    return "\n".join(lines) + "\n"


def _row(record: Record) -> str:
    attempts = ", ".join(record.attempts)
    if record.restarts:
        attempts += f"; producer started again: {record.restarts}"
    again = "never stood still" if record.training_again_s is None else f"{record.training_again_s:.1f}"
    detected = "nothing to detect" if record.detected_s is None else f"{record.detected_s:.1f} ({record.detected_by})"
    identity = f"{record.trained} + {record.rejected} + {record.quarantined} = {record.prompts}"
    cells = (
        record.title,
        record.end,
        attempts,
        detected,
        again,
        identity,
        ", ".join(record.left) or "nothing",
        f"{record.seconds:.0f}",
        "" if record.load is None else str(record.load),
        f"{record.date}, {record.revision}",
    )
    return f"| {' | '.join(cells)} |"


_COLUMNS = (
    "| disturbance | end | attempts | detected after, s | training again after, s | "
    "trained + rejected + quarantined = prompts | left behind | whole run, s | load | measured |"
)

_HEAD = """# Reliability

What becomes of a run that is disturbed in mid-training. Every row is a real run: Prefect server, work pools and
workers, Mooncake master and owner, a producer with the demo's target, a trainer in torch. Written by
`bash infra/test.sh --chaos` from the records in `docs/reliability/`, one for each scenario that held; a later run of
some scenarios (`bash infra/test.sh --chaos -k redis`) replaces theirs.

- *detected after*: from the disturbance to the first sign that the product took note of it, and which sign that was.
- *training again after*: from the disturbance to the first optimizer step after the longest pause of training that
  followed; "never stood still" where that pause was shorter than {still_s:g} s.
- *trained*: samples that the final weights have seen. The newest checkpoint names each of them once, and its count of
  samples is that of the names.
- *left behind*: processes, listening ports, shared memory, sample keys, temporary files and Prefect concurrency slots
  of the run, some seconds after its end.

Times are those of two cores that other work shared; they are no benchmark, and *load*, the processes that wanted to
run meanwhile, says how little they had of them. Measured on:

{machines}"""


def _revision() -> str:
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return described.stdout.strip()


def _machine() -> str:
    memory = psutil.virtual_memory().total / 1024**3
    packages = ", ".join(f"{name} {version(name)}" for name in ("prefect", "torch"))
    kernel = platform.release().partition("-")[0]
    return (
        f"{psutil.cpu_count()} cores ({platform.machine()}), {memory:.0f} GiB, Linux {kernel}, "
        f"Python {platform.python_version()}, {packages}"
    )
