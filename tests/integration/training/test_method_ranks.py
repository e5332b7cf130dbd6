"""Every draft method trains to the same weights on two ranks as on one, also where a rank has nothing to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from disagg_core.drafts.registry import method_names
from tests.integration.training.test_ranks import run_program

pytestmark = pytest.mark.integration

FIRST, *OTHERS = method_names()


@pytest.mark.parametrize("name", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_two_ranks_end_with_the_weights_of_one(name: str, tmp_path: Path) -> None:
    for processes in (1, 2):
        run_program(processes, ["method_rank_main.py", name, str(tmp_path)], tmp_path / f"{processes}.log")

    one, two = load_file(tmp_path / "1.safetensors"), load_file(tmp_path / "2.safetensors")

    assert one.keys() == two.keys()
    for tensor_name, weight in one.items():
        torch.testing.assert_close(two[tensor_name], weight, rtol=1e-5, atol=1e-6, msg=tensor_name)
