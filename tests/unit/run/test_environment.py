"""What a process ran in is written down, and what is not there is said to be not there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from disagg_core.run.environment import Environment, read_environment, write_environment

pytestmark = pytest.mark.unit


def test_versions_revision_and_variables_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTLINE_REDIS_PASSWORD", "hunter2!")
    monkeypatch.setenv("PATH", str(tmp_path))  # neither git nor nvidia-smi
    write_environment(tmp_path / "environment.json")
    found = Environment.model_validate_json((tmp_path / "environment.json").read_bytes())
    assert found.packages["pydantic"]
    assert found.mooncake
    assert found.gpus == []
    assert found.revision is None
    assert found.variables["DRAFTLINE_REDIS_PASSWORD"] == "***"


def test_gpus_are_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 570.1, 81559'\necho '[N/A], 570.1, [N/A]'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [(gpu.name, gpu.driver, gpu.memory_mib) for gpu in read_environment().gpus] == [
        ("NVIDIA H100 80GB HBM3", "570.1", 81559)
    ]


def test_an_sglang_that_cannot_be_asked_has_no_version() -> None:
    assert read_environment(Path("/nowhere/python")).sglang is None
    assert read_environment(Path(sys.executable)).sglang is None
