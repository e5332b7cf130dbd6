"""`draftline doctor` without a server: the machine, with a real store, and input that makes no sense."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from disagg_core.checks.doctor import Finding, machine_findings
from disagg_core.cli.doctor import doctor
from disagg_core.settings import Settings
from tests.ports import free_port

cli = Typer()
cli.command()(doctor)


@pytest.mark.integration
def test_the_machine_is_checked_with_a_real_store(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", prefect_port=free_port(), sglang_python=tmp_path / "none")

    findings = {finding.what: finding for finding in machine_findings(settings)}

    assert findings["feature store"].level == "ok", findings["feature store"]
    assert "one sample put, got and removed" in findings["feature store"].found
    assert findings["home"].level == "ok"
    assert findings["prefect port"] == Finding("ok", "prefect port", f"{settings.prefect_port} is free")
    assert findings["sglang environment"].level == "warning"
    assert "infra/sglang/setup.sh" in findings["sglang environment"].found


@pytest.mark.unit
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--server", "http://x"], "say what it should run"),
        (["--start-server"], "say what it should run"),
        (["missing.yaml"], "missing.yaml"),
        (["--server", "http://x", "--model", "./nowhere"], "no such directory"),
    ],
)
def test_input_that_makes_no_sense_is_refused(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(cli, ["--no-machine", *arguments])

    assert result.exit_code == 2, result.output
    assert said in result.output
