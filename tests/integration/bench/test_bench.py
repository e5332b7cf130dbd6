"""The benchmarks run, on real services, and print every figure beside its baseline."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from disagg_core.bench.result import as_document, as_table, machine
from disagg_core.bench.run_pair import bench_run
from disagg_core.errors import DraftlineError
from flows.cli.app import app

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_the_command_measures_every_part_and_writes_table_and_document(tmp_path: Path) -> None:
    document = tmp_path / "bench.json"
    shown = run("-m", "flows.cli.app", "bench", "all", "--quick", "--idle", "--json", str(document))
    found = json.loads(document.read_text())
    assert [result["name"] for result in found["results"]] == ["channel", "store", "draft", "loader", "pipeline"]
    assert found["machine"]["cores"] >= 1
    for result in found["results"]:
        assert any(figure["ratio"] is not None for figure in result["figures"]), result["name"]
        assert result["setting"] in " ".join(shown.split())
    pair = found["results"][-1]["figures"][2]
    assert pair["baseline"] == "the slower side alone"
    assert 0 < pair["ratio"] < 1.5


@pytest.mark.slow
def test_the_sides_of_a_run_document_are_measured_alone_and_at_once(tmp_path: Path) -> None:
    document = tmp_path / "bench.json"
    demo = str(ROOT / "infra" / "runs" / "demo.yaml")
    run("-m", "flows.cli.app", "bench", "pipeline", "--quick", "--run", demo, "--json", str(document))

    (result,) = json.loads(document.read_text())["results"]
    assert result["setting"].startswith("eagle3 for target of demo.yaml, 48 prompts in windows of 8")
    assert [figure["what"] for figure in result["figures"][:3]] == ["training alone", "capture alone", "both at once"]
    assert all(figure["value"] > 0 for figure in result["figures"][:3])


def test_a_side_that_fails_ends_the_measurement_with_its_reason(tmp_path: Path) -> None:
    demo = ROOT / "infra" / "demo"
    shutil.copytree(demo / "target", tmp_path / "target", ignore=shutil.ignore_patterns("*.safetensors"))
    document = tmp_path / "run.yaml"
    text = (ROOT / "infra" / "runs" / "demo.yaml").read_text()
    document.write_text(text.replace("../demo/target", str(tmp_path / "target")).replace("../demo", str(demo)))

    with pytest.raises(DraftlineError, match="safetensors"):
        bench_run(document, samples=8)


def test_a_run_document_is_for_the_pipeline_only() -> None:
    refused = CliRunner().invoke(app, ["bench", "store", "--run", "infra/runs/demo.yaml"])
    assert refused.exit_code == 2
    assert "is for pipeline" in " ".join(refused.output.split())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["step", "capture", "pair"])
def test_the_gpu_scripts_run_on_the_cpu_with_tiny_shapes(script: str, tmp_path: Path) -> None:
    document = tmp_path / "gpu.json"
    run("-m", f"tests.benchmarks.gpu.{script}", "--tiny", "--json", str(document))
    results = json.loads(document.read_text())["results"]
    assert [result["setting"].split(",")[0] for result in results] == ["eagle3", "dflash2"]
    assert all(figure["value"] >= 0 for result in results for figure in result["figures"] if figure["unit"] != "%")


def test_a_result_is_a_table_and_a_document() -> None:
    from disagg_core.bench.result import Figure, Result

    result = Result("store", "two samples", [Figure("rate", 10.0, "MB/s", 0.5, "copies", ">= 0.4", True)])
    table = as_table(result)
    assert [column.header for column in table.columns] == ["figure", "value", "ratio", "beside", "wanted"]
    assert as_document([result], machine())["results"][0]["figures"][0]["kept"] is True
