"""Fixtures of the chaos tier: a shared platform, platforms of one's own, runs, and the records they leave."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chaos.kit import ChaosRun
from tests.chaos.platform import ChaosPlatform, platform_in
from tests.chaos.record import Record, write_record

Start = Callable[..., ChaosRun]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChaosPlatform]:
    """The platform of all scenarios that leave it as it was."""
    with platform_in(tmp_path_factory.mktemp("chaos") / "home") as platform:
        yield platform


@pytest.fixture
def own(tmp_path: Path) -> Iterator[ChaosPlatform]:
    """A platform for one scenario, which may break it."""
    with platform_in(tmp_path / "chaos-home") as platform:
        yield platform


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Callable[[Record], None]:
    """Keep the record of this scenario, in its module's group, at its place in it."""
    module, line, _ = request.node.location
    group = Path(module).stem.removeprefix("test_").replace("_", " ")

    def write(record: Record) -> None:
        placed = record.model_copy(update={"group": group, "place": line or 0})
        write_record(placed, re.sub(r"\W+", "-", request.node.name.removeprefix("test_")).strip("-"))

    return write


@pytest.fixture
def start(request: pytest.FixtureRequest, keep: Callable[[Record], None]) -> Start:
    """Start a run of `chaos.yaml` with a title and settings, on the shared platform or on the one that is given."""

    def begin(title: str, *settings: str, on: ChaosPlatform | None = None, delay_s: float = 0.0) -> ChaosRun:
        run = ChaosRun(on or request.getfixturevalue("shared"), title, keep, *settings)
        run.submit(delay_s=delay_s)
        return run

    return begin
