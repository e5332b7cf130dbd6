"""A real store for the tests of this room: one for all that only read and write, their own for those that kill."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from disagg_core.contracts import RunIdentity
from disagg_core.plan import StoreEndpoints
from disagg_core.store import MooncakeFeatureStore, managed_store

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def endpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreEndpoints]:
    """A store of 128 MiB that lives as long as the tests."""
    with managed_store(128 << 20, log_dir=tmp_path_factory.mktemp("store")) as running:
        yield running


@pytest.fixture
def run_id(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run of its own for each test, with the characters that run ids have."""
    return f"{tmp_path.name}.x-1"


@pytest.fixture
def identity(run_id: str) -> RunIdentity:
    return identity_of(run_id)


@pytest.fixture
def open_store(endpoints: StoreEndpoints, run_id: str) -> Iterator[Callable[..., MooncakeFeatureStore]]:
    """Open clients of the test's namespace; all are closed, and the namespace must be empty at the end."""
    opened: list[MooncakeFeatureStore] = []

    def open_one(**options: object) -> MooncakeFeatureStore:
        given = {"namespace": f"{run_id}/1", "staging_bytes": 8 << 20, **options}
        opened.append(MooncakeFeatureStore(endpoints, **given))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., MooncakeFeatureStore]) -> MooncakeFeatureStore:
    return open_store()


def identity_of(run_id: str, attempt: int = 1) -> RunIdentity:
    return RunIdentity(
        run_id=run_id, attempt=attempt, strategy="eagle3", target_model_version="target-1", tokenizer_version="tok-1",
        vocab_map_version="vocab-1", draft_weight_version=0, aux_layers=(1, 2, 3), dtype="bfloat16",
    )  # fmt: skip
