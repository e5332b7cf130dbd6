"""Recurring training on a whole platform: a source of prompts that grows, and nights as the clock starts them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import yaml

from disagg_core.processes.retry import wait_until
from disagg_core.report.document import RunReport
from disagg_core.run.plan import run_id_of
from disagg_core.run_spec.yaml_file import load_spec
from tests.chaos.platform import FINAL, ChaosPlatform, environment_of

DOCUMENT = Path(__file__).with_name("nights.yaml")
DEMO_PROMPTS = Path(__file__).resolve().parents[2] / "infra" / "demo" / "prompts.jsonl"
NIGHTLY = "online-disagg-training/nightly"
NIGHT_S = 1200.0
"""From the start of a night to its end, on a machine that others use too."""
EVENT_S = 300.0
"""From a stroke of the clock, or from an event, to the run that it starts."""
ALWAYS_ASKED = ("gate.approval=always", "gate.min_gain=null", "evaluation.prompts=6")
"""Settings of a night that is even smaller, and whose draft a person decides about whatever it is worth."""


class Nights:
    """Recurring training that is registered on a platform, the file of prompts that it reads, and its runs."""

    def __init__(self, platform: ChaosPlatform, folder: Path) -> None:
        self.platform = platform
        self.prompts = folder / "prompts.jsonl"
        self.document = folder / "nightly.yaml"
        self.registry = folder / "registry"
        self._answers = DEMO_PROMPTS.read_text().splitlines()

    # --- what it trains on --------------------------------------------------------------------------------------

    def arrive(self, first: int, last: int) -> None:
        """Append these of the demo's prompts, with the answers that belong to them."""
        self._append(json.loads(line) for line in self._answers[first:last])

    def arrive_damaged(self, first: int, last: int) -> None:
        """Append these of the demo's prompts, with answers that a broken logger left: the same word over and over."""
        records = [json.loads(line) for line in self._answers[first:last]]
        for record in records:
            record["messages"][-1]["content"] = "no " * 60
        self._append(records)

    def _append(self, records: Iterable[dict[str, Any]]) -> None:
        with self.prompts.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    # --- its runs -----------------------------------------------------------------------------------------------

    def register(self, *settings: str, cron: str = "0 22 29 2 *") -> None:
        """Register the document with these settings, as a person does; its clock strikes every fourth year."""
        places = [f"data.prompts={self.prompts}", f"registry.url={self.registry}"]
        spec = load_spec(DOCUMENT, [*places, *settings])
        self.document.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
        self.draftline("register", "--nightly", str(self.document), "--cron", cron)

    def draftline(self, *arguments: str) -> str:
        """Run the command in a shell that names the platform's server; return what it says."""
        self.platform.environment["PREFECT_API_URL"] = self.platform.api
        return self.platform.draftline(*arguments)

    def refused(self, *arguments: str) -> str:
        """Run the command, which must find something wrong with what it is asked; return what it says."""
        done = subprocess.run(
            [Path(sys.executable).with_name("draftline"), *arguments],
            env={**self.platform.environment, "PREFECT_API_URL": self.platform.api},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 2, done.stdout
        return done.stdout

    def start(self, deployment: str = NIGHTLY, **parameters: object) -> str:
        """Start a run of a deployment, by default a night as the clock does; return the id of the flow run."""
        given = [part for name, value in parameters.items() for part in ("--param", f"{name}={json.dumps(value)}")]
        said = self.platform.prefect("deployment", "run", deployment, *given)
        found = re.search(r"UUID: ([0-9a-f-]{36})", said)
        assert found is not None, said
        return found[1]

    def runs_of(self, deployment: str) -> list[dict[str, Any]]:
        """Return the runs of a deployment that are due by now, the oldest first."""
        runs = self.platform.post(
            "flow_runs/filter", deployments={"name": {"any_": [deployment]}}, sort="EXPECTED_START_TIME_ASC"
        )
        return [run for run in runs if run["state"]["name"] != "Scheduled" or not run["auto_scheduled"]]

    def await_runs_of(self, deployment: str, count: int) -> list[dict[str, Any]]:
        """Wait until a deployment has so many runs, and return them."""
        assert wait_until(lambda: len(self.runs_of(deployment)) >= count, timeout_s=EVENT_S, every_s=0.5), deployment
        return self.runs_of(deployment)

    def await_run(self, state: str) -> dict[str, Any]:
        """Wait until a night is in a state of this name, and return it."""

        def found() -> list[dict[str, Any]]:
            return [run for run in self.runs_of("nightly") if run["state"]["name"] == state]

        assert wait_until(lambda: bool(found()), timeout_s=EVENT_S, every_s=0.2), self.runs_of("nightly")
        return found()[0]

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the events of this name that the server has, once there is one."""

        def found() -> list[dict[str, Any]]:
            return list(self.platform.post("events/filter", filter={"event": {"name": [name]}})["events"])

        assert wait_until(lambda: bool(found()), timeout_s=EVENT_S, every_s=0.5), f"no event {name}"
        return found()

    def page_of(self, flow_run_id: str) -> str:
        """Return the URL of a run's page in the Prefect UI."""
        return f"{self.platform.api.removesuffix('/api')}/runs/flow-run/{flow_run_id}"

    def state_of(self, flow_run_id: str) -> dict[str, Any]:
        """Return the state of a flow run, as the server has it."""
        return dict(self.platform.get(f"flow_runs/{flow_run_id}")["state"])

    def await_state(self, flow_run_id: str, *names: str) -> dict[str, Any]:
        """Wait until a run is in a state with one of these names; one that has ended otherwise fails the test."""

        def there() -> bool:
            try:
                state = self.state_of(flow_run_id)
            except httpx.TransportError:  # a server that is busy, or that the test has killed
                return False
            return state["name"] in names or state["type"] in FINAL

        assert wait_until(there, timeout_s=NIGHT_S, every_s=0.5), self._told(flow_run_id)
        state = self.state_of(flow_run_id)
        assert state["name"] in names, self._told(flow_run_id)
        return state

    def holds_nothing(self, flow_run_id: str) -> bool:
        """Whether the process of a run ends, and every slot is free; waits for it."""
        processes = self.platform.processes

        def gone() -> bool:
            ids = {environment_of(process).get("PREFECT__FLOW_RUN_ID") for process in processes()}
            return flow_run_id not in ids and self.platform.taken_slots() == {}

        return wait_until(gone, timeout_s=120, every_s=0.5)

    def night(self, end: str) -> tuple[str, str]:
        """Run a night that ends as `end`; return the id of its flow run, and what its state says."""
        flow_run_id = self.start()
        return flow_run_id, str(self.await_state(flow_run_id, end)["message"])

    def _told(self, flow_run_id: str) -> str:
        logs = self.platform.post("logs/filter", logs={"flow_run_id": {"any_": [flow_run_id]}}, sort="TIMESTAMP_DESC")
        said = [str(log["message"])[-2000:] for log in reversed(logs[:20])]
        return "\n".join([json.dumps(self.state_of(flow_run_id), indent=2)[-3000:], *said])

    # --- what came of them --------------------------------------------------------------------------------------

    def drafts(self) -> dict[str, Any]:
        """Return the registry's versions and champion, as `draftline drafts list` has them."""
        return dict(json.loads(self.in_registry("list", "--json")))

    def history(self) -> list[dict[str, Any]]:
        """Return every move of the champion, as `draftline drafts history` has them."""
        return list(json.loads(self.in_registry("history", "--json")))

    def in_registry(self, command: str, *arguments: str) -> str:
        """Run a command of `draftline drafts` on the registry of these nights."""
        return self.draftline("drafts", command, "--registry", str(self.registry), *arguments)

    def report_of(self, flow_run_id: str) -> RunReport:
        """Return the report of a run."""
        path = self.platform.home / "runs" / self.run_id(flow_run_id) / "report.json"
        return RunReport.model_validate_json(path.read_bytes())

    def run_id(self, flow_run_id: str) -> str:
        """Return what a flow run is called in the home."""
        return run_id_of(load_spec(self.document), flow_run_id)
