"""Real SGLang servers on the CPU, tiny models made here, and a real store. One server per model and session."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from disagg_core.contracts import Capture
from disagg_core.engines.servers.process import ManagedServer
from disagg_core.engines.sglang.client import SglangClient
from disagg_core.engines.sglang.launch import ServerLaunch, find_sglang_python
from disagg_core.engines.sglang.target import SGLangTarget
from disagg_core.run_spec.document import GenerateSection, StoreSection, TargetSection
from disagg_core.settings import get_settings
from disagg_core.store import MooncakeFeatureStore, managed_store
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.target.facts import read_target_facts
from tests.kit.runs import draftline, home
from tests.kit.waiting import eventually
from tests.sglang.support import CAPTURE, MAX_TOKENS, START_TIMEOUT_S, Served, identity_of, save_model

__all__ = ["draftline", "home"]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_model(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


def up(client: SglangClient, server: ManagedServer) -> bool:
    """Whether the server is healthy; fails the test at once if it has ended."""
    ended = server.exit_reason()
    assert ended is None, ended
    return client.healthy(20.0)


@pytest.fixture(scope="session")
def served(
    model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Served]]:
    """Start the server of a family on first use; all are stopped at the end of the session."""
    running: dict[str, Served] = {}
    logs = tmp_path_factory.mktemp("sglang-logs")

    def get(family: str) -> Served:
        if family not in running:
            directory = model_of(family)
            section = TargetSection(model=str(directory), backend="sglang", dtype="float32", device="cpu")
            facts = read_target_facts(section)
            python = find_sglang_python(get_settings())
            launch = ServerLaunch(python, section, facts, CAPTURE, longest=MAX_TOKENS, cpu=True, host="127.0.0.1")
            server = ManagedServer(launch, index=len(running), log_dir=logs)
            server.start()
            running[family] = Served(directory, section, facts, server)
            client = SglangClient(family, server.url, timeout_s=60.0)
            eventually(
                lambda: client.healthy(20.0),
                lambda server=server: f"the {family} server: {server.exit_reason() or ''} (log: {server.log})",
                within_s=START_TIMEOUT_S,
                every_s=0.1,
                alive=lambda server=server: server.exit_reason() is None,
            )
            client.close()
        return running[family]

    yield get
    for entry in running.values():
        entry.server.stop()


@pytest.fixture(scope="session")
def endpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreEndpoints]:
    with managed_store(256 << 20, log_dir=tmp_path_factory.mktemp("store")) as found:
        yield found


@pytest.fixture
def store(endpoints: StoreEndpoints) -> Iterator[MooncakeFeatureStore]:
    """A store with a namespace of its own, in which every test leaves nothing behind."""
    with MooncakeFeatureStore(endpoints, namespace=f"run-{uuid.uuid4().hex[:8]}/1") as opened:
        yield opened
        assert opened.key_count() == 0, "the test left samples in the store"


@pytest.fixture
def target_of(store: MooncakeFeatureStore, tmp_path: Path) -> Iterator[Callable[..., SGLangTarget]]:
    """Make targets over given servers; they are prepared, and closed after the test."""
    made: list[SGLangTarget] = []

    def make(
        served: Served,
        urls: tuple[str, ...] | None = None,
        *,
        capture: Capture = CAPTURE,
        generate: GenerateSection | None = None,
        prepare: bool = True,
        **changes: object,
    ) -> SGLangTarget:
        section = served.section.model_copy(update={"server_urls": urls or (served.url,), **changes})
        target = SGLangTarget(
            section,
            served.facts,
            capture,
            store=store,
            store_section=StoreSection(),
            max_tokens=MAX_TOKENS,
            log_dir=tmp_path,
            settings=get_settings(),
            generate=generate,
        )
        made.append(target)
        if prepare:
            target.prepare(identity_of(served.facts, store, capture))
        return target

    yield make
    for target in made:
        target.close()
