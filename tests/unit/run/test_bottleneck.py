"""What holds a run up, said in one line from what both sides say of their last minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from disagg_core.run.bottleneck import bottleneck_line
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.yaml_file import load_spec

pytestmark = pytest.mark.unit

SPEC = Path(__file__).resolve().parents[3] / "infra" / "runs" / "qwen3-8b-eagle3.yaml"


def spec_with(*overrides: str) -> RunSpec:
    return load_spec(SPEC, overrides)


def training(**shares: float) -> dict[str, float | str | None]:
    given = {"refs": 0.0, "features": 0.0, "save": 0.0, "forward": 0.3} | shares
    return {f"share_{name}": value for name, value in given.items()} | {"train_capacity": 30.0, "left_s": 600}


def capture(**shares: float) -> dict[str, float | str | None]:
    given = {"space": 0.0, "generate": 0.0, "prefill": 0.5} | shares
    return {f"share_{name}": value for name, value in given.items()} | {"infer_capacity": 18.5, "left_s": 720}


def test_training_that_waits_for_captures_asks_for_more_capture() -> None:
    gpus = ("orchestration.devices.rollout=[0, 1]", "orchestration.devices.train=[2, 3, 4, 5]")
    spec = spec_with("target.servers=2", "training.processes=4", *gpus)
    line = bottleneck_line(spec, capture(), training(refs=0.36, features=0.02))
    assert line == (
        "inference-bound: training waits 38% for features; capture is the slower side "
        "(capture 18.5, training 30.0 samples/s at most): "
        "add one rollout server (target.servers: 3) or move a GPU from training (training.processes: 3); 12 min left"
    )


def test_capture_that_mostly_generates_is_told_so() -> None:
    line = bottleneck_line(spec_with(), capture(generate=0.6, prefill=0.2), training(refs=0.5))
    assert line is not None
    assert "data.generate.max_new_tokens" in line


def test_capture_that_waits_for_space_asks_for_more_training() -> None:
    line = bottleneck_line(spec_with("training.processes=2"), capture(space=0.41), training())
    assert line is not None
    assert line.startswith("training-bound: capture waits 41% for space; training is the slower side")
    assert "add a training rank (training.processes: 3)" in line


def test_features_that_are_late_although_their_references_are_there_are_the_stores_fault() -> None:
    line = bottleneck_line(spec_with("store.protocol=tcp"), capture(), training(features=0.2, refs=0.01))
    assert line is not None
    assert line.startswith("store-bound: training waits 20% for features that are in the store already")
    assert "training.prefetch_samples or use store.protocol: rdma" in line


def test_two_sides_that_keep_each_other_busy_are_balanced_and_long_saves_are_named() -> None:
    line = bottleneck_line(spec_with(), capture(space=0.01), training(refs=0.02, save=0.08))
    assert line is not None
    assert line.startswith("balanced: neither side waits (capture 18.5, training 30.0 samples/s at most)")
    assert "checkpoints take 8%: raise training.save_every_steps" in line


def test_nothing_is_said_before_the_first_step_and_after_the_last() -> None:
    assert bottleneck_line(spec_with(), capture(), {"phase": "waiting for samples"}) is None
    assert bottleneck_line(spec_with(), capture(), training() | {"phase": "finished"}) is None
