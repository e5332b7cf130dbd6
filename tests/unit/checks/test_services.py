"""SGLang servers of others, asked before a run whether they are its target and take its samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from disagg_core.checks.preflight import check_run
from disagg_core.checks.services import check_servers
from disagg_core.engines.servers.wire import SGLANG_VERSION, WIRE_KEY, ProbeReply, ServerFacts, encode_reply
from disagg_core.engines.sglang import plugin
from disagg_core.errors import TargetError
from disagg_core.run.plan import RunPlan
from disagg_core.run_spec.yaml_file import load_spec
from disagg_core.settings import Settings
from disagg_core.target.facts import model_fingerprint
from tests.ports import free_port
from tests.unit.engines.conftest import ScriptedServer

pytestmark = pytest.mark.unit

DEMO = Path(__file__).resolve().parents[3] / "infra" / "runs" / "demo.yaml"


@pytest.fixture
def plan(tmp_path: Path) -> RunPlan:
    return check_run(load_spec(DEMO, ["data.limit=40"]), Settings(home=tmp_path))


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    started = ScriptedServer()
    yield started
    started.close()


def facts_of(plan: RunPlan, **changes: Any) -> ServerFacts:
    target = plan.target
    facts = ServerFacts(
        sglang_version=SGLANG_VERSION, model_path=target.model, revision=None,
        fingerprint=model_fingerprint(target.model, plan.spec.target.revision), model_type=target.model_type,
        num_layers=target.num_layers, hidden_size=target.hidden_size, vocab_size=target.vocab_size, dtype=target.dtype,
        aux_layers=list(plan.capture.layers), context_length=plan.spec.data.max_tokens + 2, tensor_parallel=1,
        settings={},
    )  # fmt: skip
    return msgspec.structs.replace(facts, **changes)


def says(facts: ServerFacts) -> Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]:
    reply = encode_reply(ProbeReply(facts=facts, now=0.0, tensors={}, data=b""))
    return lambda body: (200, {"output_ids": [7], "meta_info": {WIRE_KEY: [reply]}})


def served_by(plan: RunPlan, *urls: str) -> RunPlan:
    target = plan.spec.target.model_copy(update={"backend": "sglang", "server_urls": urls})
    return plan.model_copy(update={"spec": plan.spec.model_copy(update={"target": target})})


def test_every_server_is_asked_and_every_difference_is_named(plan: RunPlan, server: ScriptedServer) -> None:
    server.answer = says(facts_of(plan))
    check_servers(served_by(plan, server.url))

    longest = plan.spec.data.max_tokens
    server.answer = says(facts_of(plan, context_length=longest + 1, fingerprint="org/other@main"))
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(TargetError) as caught:
        check_servers(served_by(plan, server.url, nobody))
    message = str(caught.value)
    assert f"context length: expected at least {longest + 2} (data.max_tokens + 2), found {longest + 1}" in message
    assert f"--context-length {longest + 2}" in message
    assert "config and weights: expected " in message
    assert nobody in message, "and the other one too"


def test_a_hub_models_server_needs_no_revision_if_it_runs_the_commit() -> None:
    config = SimpleNamespace(hf_config=SimpleNamespace(_commit_hash="abc"), revision=None)
    assert model_fingerprint("org/model", plugin._revision(config)) == model_fingerprint("org/model", "abc")
    config.hf_config = SimpleNamespace()
    assert model_fingerprint("org/model", plugin._revision(config)) == "org/model@main"
