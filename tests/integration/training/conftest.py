"""A real Mooncake store, a real file channel, and tiny samples: the consumer with everything around it but a target."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from disagg_core.store import managed_store
from disagg_core.store.endpoints import StoreEndpoints


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def endpoints(tmp_path_factory) -> Iterator[StoreEndpoints]:
    with managed_store(128 << 20, host="127.0.0.1", log_dir=tmp_path_factory.mktemp("mooncake")) as found:
        yield found


@pytest.fixture
def run_id(tmp_path: Path) -> str:
    return f"run-{tmp_path.name}".replace("[", "-").replace("]", "")
