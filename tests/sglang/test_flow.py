"""The whole flow with ``target.backend: sglang``: from prompts to an evaluated draft, with nothing left over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from disagg_core.channel import StreamingRefChannel
from disagg_core.contracts import sample_id_of
from disagg_core.report.document import RunReport
from disagg_core.report.markdown import to_markdown
from tests.kit.runs import TINY, Draftline, report_of, settings
from tests.kit.waiting import eventually
from tests.sglang.support import START_TIMEOUT_S

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]

PATIENT = ("orchestration.stall_timeout_s=600", "channel.idle_timeout_s=600")


def sglang_run(*changes: str) -> list[str]:
    """Return the arguments of a run of the tiny document over SGLang servers."""
    return ["run", str(TINY), *settings("target.backend=sglang", *PATIENT, *changes)]


def report_after(run: subprocess.Popen[str], home: Path) -> RunReport:
    """Wait for the end of a run and return its report; a run that failed shows its logs."""
    output, _ = run.communicate(timeout=700)
    logs = "\n".join(path.read_text(errors="replace")[-3000:] for path in home.glob("runs/*/attempts/*/logs/*.log"))
    assert run.returncode == 0, f"{output}\n{logs}"
    return report_of(home)


def servers_of(home: Path) -> dict[str, int]:
    """Return the process ids of the running servers of a home by name, which is that of the log they write."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        if "sglang.launch_server" in (process.info["cmdline"] or ()):
            with suppress(OSError):
                log = Path(f"/proc/{process.pid}/fd/1").readlink()
                if log.is_relative_to(home) and os.getpgid(process.pid) == process.pid:
                    found[log.stem] = process.pid
    return found


def published(home: Path) -> int:
    """Return how many samples the producer says that it has published."""
    for path in home.glob("runs/*/attempts/1/state/producer.json"):
        return int(json.loads(path.read_bytes()).get("published") or 0)
    return 0


def test_a_run_over_sglang_trains_on_every_prompt_and_its_accounting_holds(draftline: Draftline, home: Path) -> None:
    report = report_after(draftline(*sglang_run()), home)

    accounting = report.accounting
    assert accounting is not None
    assert accounting.prompts == accounting.published == accounting.trained == 44
    assert (accounting.rejected, accounting.quarantined, accounting.store_keys_left) == (0, 0, 0)
    assert report.evaluation is not None
    assert report.evaluation.lossless
    assert [server.name for server in report.servers] == ["sglang-0"]
    assert report.servers[0].captured >= 44
    assert servers_of(home) == {}


@pytest.mark.slow
def test_a_run_that_loses_two_of_three_servers_trains_on_every_prompt_once_and_its_report_names_them(
    draftline: Draftline, home: Path
) -> None:
    """One server is killed and one stops answering, in the middle; long enough before the end to be found out."""
    prompts = 800
    run = draftline(
        *sglang_run(
            f"data.limit={prompts}",
            "target.servers=3",
            "target.request_timeout_s=15",
            "training.save_every_steps=50",
        )
    )
    eventually(lambda: published(home) >= 60, "the first samples", within_s=2 * START_TIMEOUT_S, every_s=0.1)
    servers = servers_of(home)
    assert sorted(servers) == ["sglang-0", "sglang-1", "sglang-2"]
    os.killpg(servers["sglang-0"], signal.SIGKILL)
    os.killpg(servers["sglang-1"], signal.SIGSTOP)

    report = report_after(run, home)

    assert [attempt.failure_class for attempt in report.attempts] == [None]
    accounting = report.accounting
    assert accounting is not None
    assert accounting.prompts == accounting.published == accounting.trained == prompts
    assert (accounting.rejected, accounting.quarantined, accounting.store_keys_left) == (0, 0, 0)
    with StreamingRefChannel(Path(report.run_dir) / "attempts/1/channel", run_id=report.run_id) as channel:
        assert sorted(channel.published_sample_ids()) == [sample_id_of(ordinal) for ordinal in range(prompts)]

    events = {server.name: "; ".join(server.events) for server in report.servers}
    assert "died: killed by SIGKILL" in events["sglang-0"]
    assert "hangs: no good answer to a health check" in events["sglang-1"]
    told = to_markdown(report)
    for name in ("sglang-0", "sglang-1"):
        [line] = [line for line in told.splitlines() if line.startswith(f"| {name} |")]
        assert events[name] in line
    assert {server.name: server.restarts for server in report.servers}["sglang-2"] == 0
    assert servers_of(home) == {}
