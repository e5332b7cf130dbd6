"""`draftline doctor` against a real server: what it says of a good one, of a wrong one and of none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from disagg_core.cli.doctor import doctor
from tests.sglang.support import CAPTURE, Served

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]

cli = Typer()
cli.command()(doctor)


def test_a_good_server_passes(served: Callable[[str], Served]) -> None:
    llama = served("llama")

    result = CliRunner().invoke(cli, ["--no-machine", "--server", llama.url, "--model", str(llama.directory)])

    assert result.exit_code == 0, result.output
    for layer in CAPTURE.layers:
        assert f"output of layer {layer}: relative error" in result.output
    assert "last hidden state: relative error" in result.output
    assert "version: sglang 0.5.23" in result.output
    assert "server memory: max_total_tokens" in result.output


def test_a_server_with_another_model_fails(served: Callable[[str], Served], model_of: Callable[[str], Path]) -> None:
    llama = served("llama")

    result = CliRunner().invoke(cli, ["--no-machine", "--server", llama.url, "--model", str(model_of("qwen3"))])

    assert result.exit_code == 1
    assert "model type: expected qwen3, found llama" in result.output
    assert "config and weights: expected" in result.output


def test_nobody_at_the_address_fails(model_of: Callable[[str], Path]) -> None:
    result = CliRunner().invoke(
        cli, ["--no-machine", "--server", "http://127.0.0.1:9", "--model", str(model_of("llama"))]
    )

    assert result.exit_code == 1
    assert "http://127.0.0.1:9 does not answer" in result.output
