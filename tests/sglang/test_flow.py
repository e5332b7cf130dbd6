"""The whole flow with ``target.backend: sglang``: from prompts to an evaluated draft, with nothing left over."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from disagg_core.report import RunReport

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "e2e" / "tiny.yaml"


@pytest.fixture
def draftline(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Run the command in a home of its own; what is left running is taken down at the end."""
    home = tmp_path / "home"
    environment = {**os.environ, "DRAFTLINE_HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = Path(sys.executable).with_name("draftline")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=tmp_path,
            timeout=700,
            check=False,
        )

    yield run
    run("down")


def test_a_run_over_sglang_trains_on_every_prompt_and_its_accounting_holds(
    draftline: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    home = tmp_path / "home"
    done = draftline(
        "run",
        str(TINY),
        *("--set", "target.backend=sglang"),
        *("--set", "orchestration.stall_timeout_s=600"),
        *("--set", "channel.idle_timeout_s=600"),
    )
    logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in home.glob("runs/*/attempts/*/logs/*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{logs}"

    (path,) = home.glob("runs/*/report.json")
    report = RunReport.model_validate_json(path.read_bytes())
    accounting = report.accounting
    assert accounting is not None
    assert accounting.prompts == accounting.published == accounting.trained == 44
    assert (accounting.rejected, accounting.quarantined, accounting.store_keys_left) == (0, 0, 0)
    assert report.evaluation is not None
    assert report.evaluation.lossless
    assert [server.name for server in report.servers] == ["sglang-0"]
    assert report.servers[0].captured >= 44
    assert not [line for line in running_commands() if str(tmp_path) in line]


def running_commands() -> list[str]:
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [" ".join(line) for line in lines if "sglang.launch_server" in line]
