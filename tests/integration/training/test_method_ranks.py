"""Every draft method trains to the same weights on two ranks as on one, and to the same bits through a kill."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from disagg_core.drafts.registry import method_names
from disagg_core.training.checkpoint import newest_complete
from tests.integration.forks import end, forked, run_ranks

pytestmark = pytest.mark.integration

FIRST, *OTHERS = method_names()


EVERY = [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


@pytest.mark.parametrize("name", EVERY)
def test_two_ranks_end_with_the_weights_of_one(name: str, tmp_path: Path) -> None:
    for processes in (1, 2):
        program = "tests.integration.training.method_rank_main"
        run_ranks(processes, program, [name, str(tmp_path)], tmp_path / f"{processes}.log")

    one, two = load_file(tmp_path / "1.safetensors"), load_file(tmp_path / "2.safetensors")

    assert one.keys() == two.keys()
    for tensor_name, weight in one.items():
        torch.testing.assert_close(two[tensor_name], weight, rtol=1e-5, atol=1e-6, msg=tensor_name)


@pytest.mark.parametrize("name", EVERY)
def test_a_killed_training_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    def train(root: Path, killed_at: int) -> int | None:
        program = "tests.integration.training.method_kill_main"
        process = forked(program, [name, str(root), str(killed_at)], tmp_path / "log")
        try:
            process.join(240)
            return process.exitcode
        finally:
            end(process)

    assert train(tmp_path / "whole", -1) == 0
    assert train(tmp_path / "killed", 2) == -signal.SIGKILL
    killed = newest_complete(tmp_path / "killed")
    assert killed is not None
    assert killed.name == "step-2"
    assert train(tmp_path / "killed", -1) == 0

    for file in ("draft.safetensors", "optimizer.safetensors"):
        whole, resumed = ((tmp_path / run / "step-4" / file).read_bytes() for run in ("whole", "killed"))
        assert whole == resumed, file
