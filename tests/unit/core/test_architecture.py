"""The house: who may import whom, and which rooms stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[3]

# From the ground up. A room may import rooms of lower floors only, and itself.
FLOORS = [
    {"errors", "failures", "contracts", "ordinals", "files", "host_memory"},
    {"run_spec", "processes", "settings"},
    {"target", "store", "storage"},
    {"drafts", "prompts", "run"},
    {"evaluation", "channel", "engines", "report"},
    {"training", "rollout", "checks", "registry", "tracking"},
    {"roles", "recurring", "capacity", "bench"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Every module that `path` imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "disagg_core").parts[0].removesuffix(".py")


def test_every_room_stands_on_a_floor() -> None:
    rooms = {room_of(path) for path in modules("disagg_core")} - {"__init__"}
    assert rooms == set(FLOOR_OF)


def test_imports_point_downwards_only() -> None:
    upwards = []
    for path in modules("disagg_core"):
        room = room_of(path)
        for name in imports_of(path):
            parts = name.split(".")
            if parts[0] != "disagg_core" or len(parts) < 2 or parts[1] not in FLOOR_OF or parts[1] == room:
                continue
            if FLOOR_OF[parts[1]] > FLOOR_OF[room]:
                upwards.append(f"{path.relative_to(ROOT)} imports {name}")
    assert upwards == []


def test_no_two_rooms_need_each_other() -> None:
    needs: dict[str, set[str]] = {room: set() for room in FLOOR_OF}
    for path in modules("disagg_core"):
        if (room := room_of(path)) in FLOOR_OF:
            names = (name.split(".") for name in imports_of(path))
            needs[room] |= {parts[1] for parts in names if parts[0] == "disagg_core" and len(parts) > 1} & set(FLOOR_OF)
            needs[room] -= {room}
    while leaves := {room for room, others in needs.items() if not others}:
        needs = {room: others - leaves for room, others in needs.items() if room not in leaves}
    assert needs == {}, "these rooms import each other in a circle"


@pytest.mark.parametrize(
    ("room", "stranger"),
    [
        ("channel", "store"),
        ("store", "channel"),
        ("drafts", "channel"),
        ("drafts", "store"),
        ("rollout", "training"),
        ("training", "rollout"),
        ("evaluation", "rollout"),
        ("evaluation", "training"),
    ],
)
def test_rooms_that_do_not_know_each_other(room: str, stranger: str) -> None:
    for path in modules(f"disagg_core/{room}"):
        assert not any(name.startswith(f"disagg_core.{stranger}") for name in imports_of(path)), path


def test_no_draft_method_is_known_outside_the_drafts() -> None:
    methods = {path.parent.name for path in (ROOT / "disagg_core" / "drafts").glob("*/method.py")}
    assert methods
    for path in [path for package in ("disagg_core", "tasks", "flows") for path in modules(package)]:
        if "drafts" not in path.parts:
            for name in imports_of(path):
                assert not any(f"{name}.".startswith(f"disagg_core.drafts.{method}.") for method in methods), path


def test_what_any_engine_of_servers_needs_knows_none_of_them() -> None:
    for path in modules("disagg_core/engines/servers"):
        assert not any(name.startswith("disagg_core.engines.sglang") for name in imports_of(path)), path


def test_the_core_knows_no_prefect_and_no_flows() -> None:
    for path in modules("disagg_core"):
        assert not any(name.split(".")[0] in {"prefect", "flows", "tasks"} for name in imports_of(path)), path


def test_tasks_do_not_import_flows() -> None:
    for path in modules("tasks"):
        assert not any(name.split(".")[0] == "flows" for name in imports_of(path)), path


LIGHT = [
    "disagg_core.contracts",
    "disagg_core.channel",
    "disagg_core.report.document",
    "disagg_core.report.records",
    "disagg_core.run.plan",
    "disagg_core.run_spec.document",
    "flows.online_disagg_training",
    "flows.platform.deployments",
    "flows.rollout_producer",
    "flows.train_consumer",
    "disagg_core.tracking.main",
]

IMPORTED_IN_TURN = """
import importlib, sys
for module in sys.argv[1:]:
    before = "torch" in sys.modules
    importlib.import_module(module)
    print(module, not before and "torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def loads_torch() -> dict[str, bool]:
    """Which of the light modules brings torch in, when a process imports one after the other."""
    command = [sys.executable, "-c", IMPORTED_IN_TURN, *LIGHT]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {module: found == "True" for module, found in map(str.split, said.splitlines())}


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_do_not_load_torch(loads_torch: dict[str, bool], module: str) -> None:
    assert not loads_torch[module]
