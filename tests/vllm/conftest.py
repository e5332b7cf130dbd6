"""A tiny target for vLLM, one for the session."""

from __future__ import annotations

import pytest
import torch

from tests.vllm.support import Target


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target.make(tmp_path_factory.mktemp("target"))
