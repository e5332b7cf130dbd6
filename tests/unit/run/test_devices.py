"""Each GPU of a node has one role, and each role sees its own only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from disagg_core.engines.sglang.launch import ServerLaunch
from disagg_core.errors import BadInput, SpecError
from disagg_core.run.devices import check_shared_node, visible_devices
from disagg_core.run.plan import RoleAssignment, make_plan
from disagg_core.run_spec.document import RunSpec
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.target.facts import read_target_facts
from flows.train_consumer import launcher

pytestmark = pytest.mark.unit

RUNS = Path(__file__).resolve().parents[3] / "infra" / "runs"
GPUS = 8
SERVED: dict[str, Any] = {"target": {"model": "org/target", "backend": "sglang"}, "data": {"prompts": "p.jsonl"}}


def spec_with(devices: dict[str, list[int]] | None = None, **sections: Any) -> RunSpec:
    document = {**SERVED, **sections}
    if devices is not None:
        document["orchestration"] = {"devices": devices}
    return RunSpec.model_validate(document)


def gpus_of_servers(spec: RunSpec, node: list[str]) -> list[str]:
    """Return the GPUs that the command lines of the servers name, by their names on the node."""
    environment = visible_devices(spec, "rollout", {})
    seen = environment["CUDA_VISIBLE_DEVICES"].split(",") if environment else node
    facts = read_target_facts(spec.target)
    plan = make_plan(spec, facts, run_id="r", root=Path("none"), total_prompts=100)
    launch = ServerLaunch(
        python=Path("python"),
        section=spec.target,
        facts=facts,
        capture=plan.capture,
        longest=spec.data.max_tokens,
        cpu=False,
        host="127.0.0.1",
    )
    used = []
    for server in range(spec.target.servers):
        command = launch.command(port=1, base_gpu=server * launch.gpus)
        first = int(command[command.index("--base-gpu-id") + 1])
        used += seen[first : first + int(command[command.index("--tp") + 1])]
    return used


def gpus_of_ranks(spec: RunSpec, node: list[str]) -> list[str]:
    """Return the GPUs of the ranks, which take the one of their local rank."""
    environment = visible_devices(spec, "train", {})
    seen = environment["CUDA_VISIBLE_DEVICES"].split(",") if environment else node
    plan = make_plan(spec, read_target_facts(spec.target), run_id="r", root=Path("none"), total_prompts=100)
    store = StoreEndpoints(master_address="a:1", metrics_address="a:2")
    options = launcher(RoleAssignment(plan=plan, attempt=1, store=store), 0)
    (ranks,) = (int(option.split("=")[1]) for option in options if option.startswith("--nproc-per-node"))
    return [seen[rank] for rank in range(ranks)]


@pytest.mark.parametrize("name", ["qwen3-8b-eagle3", "llama31-8b-eagle3", "qwen3-8b-dflash2", "qwen3-8b-dspark"])
def test_the_documents_for_one_node_of_8_gpus_use_each_gpu_once(name: str) -> None:
    spec = load_spec(RUNS / f"{name}.yaml")
    node = [str(gpu) for gpu in range(GPUS)]
    assert sorted(gpus_of_servers(spec, node) + gpus_of_ranks(spec, node)) == node
    check_shared_node(spec, GPUS)


def test_the_document_for_two_nodes_uses_each_gpu_of_both_once() -> None:
    spec = load_spec(RUNS / "qwen3-8b-eagle3-two-nodes.yaml")
    node = [str(gpu) for gpu in range(GPUS)]
    assert sorted(gpus_of_servers(spec, node)) == node
    assert gpus_of_ranks(spec, node) == node


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["orchestration.devices.rollout=[1]"], r"found \[1\] in both"),
        (["orchestration.devices.train=[1, 1, 2, 3, 4, 5, 6]"], "every GPU once in train"),
        (["orchestration.devices.train=[1, 2]"], "expected at least 7 GPUs .training.processes., found 2"),
        (["target.servers=2"], "expected at least 2 GPUs .target.servers x target.tensor_parallel., found 1"),
        (["training.device=cpu"], "devices.train: expected no GPUs for a role on the CPU"),
        (["orchestration.devices.rollout=[-1]"], "rollout"),
    ],
)
def test_a_plan_with_gpus_that_do_not_add_up_is_refused(overrides: list[str], complaint: str) -> None:
    with pytest.raises(SpecError, match=complaint):
        load_spec(RUNS / "qwen3-8b-eagle3.yaml", overrides)


def test_a_role_without_a_list_sees_what_its_worker_sees() -> None:
    assert visible_devices(spec_with(), "train", {"CUDA_VISIBLE_DEVICES": "4,5"}) == {}


def test_the_numbers_count_what_the_worker_sees() -> None:
    spec = spec_with({"rollout": [1], "train": [0]})
    worker = {"CUDA_VISIBLE_DEVICES": "GPU-aa, GPU-bb"}
    assert visible_devices(spec, "rollout", worker) == {"CUDA_VISIBLE_DEVICES": "GPU-bb"}
    assert visible_devices(spec, "train", worker) == {"CUDA_VISIBLE_DEVICES": "GPU-aa"}
    with pytest.raises(BadInput, match=r"devices.rollout: expected GPUs that the worker sees, found \[1\]"):
        visible_devices(spec, "rollout", {"CUDA_VISIBLE_DEVICES": "7"})


def test_on_one_machine_server_and_trainer_must_say_which_gpus_are_theirs() -> None:
    with pytest.raises(BadInput, match=r"both begin with GPU 0 .* rollout: \[0\], train: \[1\]"):
        check_shared_node(spec_with(), GPUS)
    check_shared_node(spec_with(), 0)
    check_shared_node(spec_with(training={"device": "cpu"}), GPUS)
    check_shared_node(spec_with({"rollout": [0], "train": [1]}), GPUS)
    with pytest.raises(BadInput, match=r"this machine, which has 1, found \[1\]"):
        check_shared_node(spec_with({"rollout": [0], "train": [1]}), 1)
