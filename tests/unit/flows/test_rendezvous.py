"""Where the nodes of a consumer meet is where its DRAFTLINE_HOST is, or the run is refused."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from disagg_core.errors import BadInput
from disagg_core.run.plan import RoleAssignment, make_plan
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import Settings
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.target.facts import read_target_facts
from flows.train_consumer import train_consumer
from tasks import rendezvous

pytestmark = pytest.mark.unit

SPEC = Path(__file__).resolve().parents[3] / "infra" / "runs" / "qwen3-8b-eagle3.yaml"


@pytest.fixture
def interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    def address(family: int, text: str) -> SimpleNamespace:
        return SimpleNamespace(family=family, address=text)

    found = {
        "lo": [address(socket.AF_INET, "127.0.0.1")],
        "eth0": [address(socket.AF_INET, "192.0.2.7")],
        "ib0": [address(socket.AF_INET, "198.51.100.7"), address(socket.AF_INET6, "fe80::7%ib0")],
        "ib1": [address(socket.AF_INET6, "2001:db8::7")],
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)


@pytest.mark.parametrize(("host", "interface"), [("198.51.100.7", "ib0"), ("2001:db8::7", "ib1")])
def test_gloo_and_nccl_speak_where_draftline_host_is(interfaces: None, host: str, interface: str) -> None:
    expected = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    assert rendezvous.network_environment(host, 2, {}) == expected
    assert rendezvous.network_environment(host, 1, {}) == {}


def test_what_the_user_has_set_stays(interfaces: None) -> None:
    set_already = {"NCCL_SOCKET_IFNAME": "ib"}
    assert rendezvous.network_environment("192.0.2.7", 2, set_already) == {"GLOO_SOCKET_IFNAME": "eth0"}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "localhost", "::1", "0.0.0.0", "::"])
def test_an_address_that_other_nodes_cannot_reach_is_refused(interfaces: None, host: str) -> None:
    with pytest.raises(BadInput, match=r"DRAFTLINE_HOST: training\.nodes above 1 needs an address"):
        rendezvous.network_environment(host, 2, {})


def test_an_address_of_another_machine_is_refused_with_those_of_this_one(interfaces: None) -> None:
    with pytest.raises(BadInput, match=r"which has 127.0.0.1, 192.0.2.7, .*, found 203.0.113.9"):
        rendezvous.network_environment("203.0.113.9", 2, {})


def meeting(folder: Path, monkeypatch: pytest.MonkeyPatch, host: str) -> list[str]:
    monkeypatch.setattr(rendezvous, "get_settings", lambda: Settings(host=host))
    monkeypatch.setattr(rendezvous, "free_port", lambda _: 29500)
    spec = SimpleNamespace(orchestration=SimpleNamespace(stall_timeout_s=1.0))
    assignment: Any = SimpleNamespace(
        plan=SimpleNamespace(spec=spec, run_id="run"), attempt=1, dir=SimpleNamespace(state=folder)
    )
    return rendezvous.meet(assignment, 0, 2)


def test_an_ipv6_address_is_written_in_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--rdzv-endpoint=[2001:db8::7]:29500" in meeting(tmp_path, monkeypatch, "2001:db8::7")
    assert json.loads((tmp_path / "rendezvous.json").read_bytes())["endpoint"] == "[2001:db8::7]:29500"


def test_a_consumer_of_two_nodes_at_loopback_ends_before_the_other_node_is_told_where_to_come(tmp_path: Path) -> None:
    spec = load_spec(SPEC, ["training.nodes=2", "rollout.high_watermark_refs=600"])
    plan = make_plan(spec, read_target_facts(spec.target), run_id="run", root=tmp_path, total_prompts=100)
    store = StoreEndpoints(master_address="a:1", metrics_address="a:2")
    assignment = RoleAssignment(plan=plan, attempt=1, store=store)
    with pytest.raises(BadInput, match=r"reach this one, found 127\.0\.0\.1"):
        train_consumer.fn(assignment)
    assert not (assignment.dir.state / "rendezvous.json").exists()
