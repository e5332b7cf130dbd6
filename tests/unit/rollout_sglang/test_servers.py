"""The command line of a server that we start, and where its Python is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagg_core.errors import MissingLibrary
from disagg_core.rollout.sglang.servers import ServerLaunch, find_sglang_python
from disagg_core.run_spec import TargetSection
from disagg_core.settings import Settings
from disagg_core.target_facts import TargetFacts

pytestmark = pytest.mark.unit


def launch(section: TargetSection, facts: TargetFacts, **changes: object) -> ServerLaunch:
    fields: dict[str, object] = {"longest": 32, "cpu": False, "host": "10.0.0.5", **changes}
    return ServerLaunch(Path("/sglang/bin/python"), section, facts, **fields)


def value(command: list[str], flag: str) -> str:
    return command[command.index(flag) + 1]


def test_layers_are_always_named_and_nothing_is_cached(section: TargetSection, facts: TargetFacts) -> None:
    command = launch(section, facts).command(port=30000, base_gpu=4)

    start = command.index("--return-aux-hidden-state-layer-ids")
    assert command[start + 1 : start + 4] == ["0", "2", "4"]
    assert {"--disable-radix-cache", "--enable-return-aux-hidden-states", "--disable-prefill-cuda-graph"} <= {*command}
    assert value(command, "--speculative-algorithm") == "EAGLE3"
    assert (value(command, "--host"), value(command, "--port")) == ("10.0.0.5", "30000")
    assert value(command, "--base-gpu-id") == "4"
    assert value(command, "--dtype") == "float32"


def test_the_runs_own_arguments_come_last(section: TargetSection, facts: TargetFacts) -> None:
    own = section.model_copy(update={"server_args": ("--mem-fraction-static", "0.7")})

    assert launch(own, facts).command(port=1, base_gpu=0)[-2:] == ["--mem-fraction-static", "0.7"]


def test_sampling_heeds_seeds_where_sglang_can(section: TargetSection, facts: TargetFacts) -> None:
    assert "--enable-deterministic-inference" in launch(section, facts, sampled=True).command(port=1, base_gpu=0)
    assert "--enable-deterministic-inference" not in launch(section, facts).command(port=1, base_gpu=0)


def test_a_sample_as_long_as_the_context_fits(section: TargetSection, facts: TargetFacts) -> None:
    tight, roomy = launch(section, facts, longest=64), launch(section, facts, longest=32)

    assert value(tight.command(port=1, base_gpu=0), "--context-length") == "66"
    assert tight.environment()["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] == "1"
    assert "--context-length" not in roomy.command(port=1, base_gpu=0)


def test_a_server_does_not_start_without_capture(section: TargetSection, facts: TargetFacts) -> None:
    environment = launch(section, facts, cpu=True).environment()

    assert environment["DRAFTLINE_CAPTURE_REQUIRED"] == "1"
    assert environment["SGLANG_USE_CPU_ENGINE"] == "1"
    assert environment["DRAFTLINE_HOST"] == "10.0.0.5"


def test_a_missing_environment_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(MissingLibrary, match=r"infra/sglang/setup\.sh --cuda"):
        find_sglang_python(Settings(home=tmp_path), checkout=tmp_path)


def test_an_environment_without_sglang_is_refused(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 0.5.22\n")
    python.chmod(0o755)

    with pytest.raises(MissingLibrary, match=r"expected sglang 0\.5\.23, found 0\.5\.22"):
        find_sglang_python(Settings(home=tmp_path, sglang_python=python))
