"""`SGLangTarget` over a scripted server: outcomes, what is taken back, and bounds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from disagg_core.contracts import PromptTask, RunIdentity, SampleRef
from disagg_core.engines.contract import Failed, Generated, Stored
from disagg_core.engines.servers.wire import (
    WIRE_KEY,
    CaptureOrder,
    RefusedReply,
    StoredReply,
    decode_order,
    encode_reply,
)
from disagg_core.engines.sglang.client import SglangClient
from disagg_core.engines.sglang.target import SGLangTarget
from disagg_core.errors import StoreUnavailable, TargetUnavailable
from disagg_core.run_spec.document import GenerateSection, StoreSection, TargetSection
from disagg_core.settings import Settings
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.target.facts import TargetFacts
from tests.unit.engines.kit import CAPTURE, IDENTITY

pytestmark = pytest.mark.unit


class Ledger:
    """Notes what the target takes back from the store."""

    def __init__(self) -> None:
        self.endpoints = StoreEndpoints(master_address="h:1", metrics_address="h:2")
        self.staging_bytes = 80 << 20
        self.namespace = "run/1"
        self.aborted: list[str] = []
        self.swept: list[str | None] = []

    def abort(self, ref: SampleRef) -> None:
        self.aborted.append(ref.sample_id)

    def sweep(self, prefix: str | None = None) -> int:
        self.swept.append(prefix)
        return 0


class Trusting(SGLangTarget):
    """Takes every server for the run's target: probes are tested elsewhere."""

    def _check(self, client: SglangClient) -> None:
        return


def stored(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    order = decode_order(body["sampling_params"]["custom_params"][WIRE_KEY])
    assert isinstance(order, CaptureOrder)
    ref = SampleRef(
        sample_id=order.sample_id,
        run_id="run",
        attempt=1,
        source_task_id=order.source_task_id,
        feature_store_uri="mooncake://h:1/run/1",
        key=f"run/1/{order.sample_id}/x",
        size_bytes=64,
        crc32=None,
        feature_specs={},
        strategy="eagle3",
        schema_version=1,
        target_model_version="v",
        draft_weight_version=0,
        tokenizer_version="k",
        vocab_map_version="m",
        num_tokens=order.num_tokens,
    )
    reply = encode_reply(StoredReply(ref=ref, copy_s=0.0, put_s=0.0))
    return 200, {"output_ids": [1], "meta_info": {WIRE_KEY: [reply]}}


def task(ordinal: int, tokens: int = 6) -> PromptTask:
    return PromptTask(ordinal=ordinal, source=f"p:{ordinal}", input_ids=[5] * tokens, loss_mask=[1] * tokens)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def target_over(
    section: TargetSection, facts: TargetFacts, ledger: Ledger, tmp_path: Path
) -> Iterator[Callable[..., SGLangTarget]]:
    made: list[SGLangTarget] = []

    def make(*servers: Any, generate: GenerateSection | None = None, **changes: Any) -> SGLangTarget:
        changed = section.model_copy(update={"server_urls": tuple(server.url for server in servers), **changes})
        target = Trusting(
            changed,
            facts,
            CAPTURE,
            store=ledger,
            store_section=StoreSection(),
            max_tokens=16,
            log_dir=tmp_path,
            settings=Settings(home=tmp_path),
            generate=generate,
            health_timeout_s=1.0,
        )
        made.append(target)
        target.prepare(IDENTITY)
        return target

    yield make
    for target in made:
        target.close()


def test_every_task_gets_one_outcome_and_requests_are_bounded(
    scripted: Callable[[], Any], target_over: Callable[..., SGLangTarget]
) -> None:
    server = scripted()
    server.answer = stored
    target = target_over(server, server_concurrency=3)

    outcomes = list(target.capture([task(ordinal) for ordinal in range(20)], avoid={}))

    assert sorted(outcome.task.ordinal for outcome in outcomes) == list(range(20))
    assert all(isinstance(outcome, Stored) for outcome in outcomes)
    assert server.most_at_once <= 3
    assert target.concurrency == 3


def test_what_a_broken_server_may_have_stored_is_swept_before_the_task_goes_back(
    scripted: Callable[[], Any], target_over: Callable[..., SGLangTarget], ledger: Ledger
) -> None:
    server = scripted()
    server.answer = lambda body: (500, {"error": "broken"})
    target = target_over(server)

    [outcome] = target.capture([task(4)], avoid={})

    assert outcome == Failed(task(4), f"{server.url} answered 500: broken", retryable=True, server=server.url)
    assert ledger.swept == ["run/1/s000000004"]
    assert target.health()[0].failures == 1


def test_an_answer_that_makes_no_sense_is_the_servers_fault_and_another_server_may_do_better(
    scripted: Callable[[], Any], target_over: Callable[..., SGLangTarget], ledger: Ledger
) -> None:
    broken, good = scripted(), scripted()
    broken.answer = lambda body: (200, b"<html>")
    good.answer = stored
    target = target_over(broken, good)

    [first] = target.capture([task(4)], avoid={4: frozenset({good.url})})
    [second] = target.capture([task(4)], avoid={4: frozenset({first.server})})

    assert isinstance(first, Failed)
    assert first.retryable
    assert "cannot be read" in first.reason
    assert ledger.swept == ["run/1/s000000004"]
    assert {server.name: server.failures for server in target.health()} == {broken.url: 1, good.url: 0}
    assert isinstance(second, Stored)
    assert second.server == good.url


@pytest.mark.parametrize("tokens", [[100], [-1, 5], [5] * 99])
def test_a_continuation_that_was_not_asked_for_is_the_servers_fault(
    scripted: Callable[[], Any], target_over: Callable[..., SGLangTarget], tokens: list[int]
) -> None:
    server = scripted()
    server.answer = lambda body: (200, {"output_ids": tokens, "meta_info": {}})
    target = target_over(server, generate=GenerateSection(max_new_tokens=4))

    [outcome] = target.generate([task(1)], avoid={})

    assert isinstance(outcome, Failed)
    assert outcome.retryable
    assert "expected at most 4 token ids of 100" in outcome.reason


def test_a_server_that_nobody_can_reach_costs_a_prompt_no_attempt(
    scripted: Callable[[], Any], target_over: Callable[..., SGLangTarget], ledger: Ledger
) -> None:
    """Its end shows in refused connections before anybody has taken it out."""
    gone, good = scripted(), scripted()
    good.answer = stored
    target = target_over(gone, good)
    gone.close()

    outcomes = list(target.capture([task(ordinal) for ordinal in range(6)], avoid={0: frozenset({good.url})}))

    assert all(isinstance(outcome, Stored) for outcome in outcomes)
    assert {outcome.server for outcome in outcomes} == {good.url}
    assert ledger.swept == [], "nothing was tried, so nothing can have been left in the store"


def test_without_a_server_that_can_be_reached_the_target_is_unavailable(
    scripted: Callable[[], Any], target_over: Callable[..., SGLangTarget]
) -> None:
    server = scripted()
    server.answer = stored
    target = target_over(server)
    list(target.capture([task(0)], avoid={}))
    server.close()

    with pytest.raises(TargetUnavailable, match="no server is usable at present"):
        list(target.capture([task(1)], avoid={}))


def test_a_store_that_is_gone_ends_the_run_and_blames_no_prompt(
    scripted: Callable[[], Any],
    target_over: Callable[..., SGLangTarget],
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(prefix: str | None = None) -> int:
        raise StoreUnavailable("the master does not answer")

    server = scripted()
    refusal = encode_reply(RefusedReply(reason="StoreUnavailable: -900", retryable=True, store=True))
    server.answer = lambda body: (200, {"meta_info": {WIRE_KEY: [refusal]}})
    target = target_over(server)
    monkeypatch.setattr(ledger, "sweep", gone)

    with pytest.raises(StoreUnavailable, match="the master does not answer"):
        list(target.capture([task(1)], avoid={}))


def test_a_refusal_is_the_prompts_affair(
    scripted: Callable[[], Any], target_over: Callable[..., SGLangTarget], ledger: Ledger
) -> None:
    server = scripted()
    refusal = encode_reply(RefusedReply(reason="rows", retryable=False))
    server.answer = lambda body: (200, {"meta_info": {WIRE_KEY: [refusal]}})
    target = target_over(server)

    [outcome] = target.capture([task(1)], avoid={})

    assert isinstance(outcome, Failed)
    assert (outcome.reason, outcome.retryable) == ("rows", False)
    assert ledger.swept == []
    assert target.health()[0].failures == 0


def test_a_task_goes_to_another_server_than_the_one_it_failed_on(
    scripted: Callable[[], Any], target_over: Callable[..., SGLangTarget]
) -> None:
    servers = [scripted(), scripted()]
    for server in servers:
        server.answer = stored
    target = target_over(*servers)

    outcomes = [
        outcome
        for ordinal in range(6)
        for outcome in target.capture([task(ordinal)], avoid={ordinal: frozenset({servers[0].url})})
    ]

    assert {outcome.server for outcome in outcomes} == {servers[1].url}


def test_what_nobody_takes_is_removed(
    scripted: Callable[[], Any], target_over: Callable[..., SGLangTarget], ledger: Ledger
) -> None:
    server = scripted()
    server.answer = stored
    target = target_over(server)

    outcomes = target.capture([task(ordinal) for ordinal in range(8)], avoid={})
    taken = next(iter(outcomes))
    outcomes.close()  # type: ignore[attr-defined]

    assert isinstance(taken, Stored)
    requests = server.requests
    assert len(ledger.aborted) == requests - 1
    assert taken.ref.sample_id not in ledger.aborted


def test_without_a_usable_server_nothing_is_attempted(
    scripted: Callable[[], Any], target_over: Callable[..., SGLangTarget], ledger: Ledger
) -> None:
    server = scripted()
    server.answer = lambda body: (500, {})
    target = target_over(server)
    list(target.capture([task(0)], avoid={}))  # the first failure of a server on probation takes it out
    requests = server.requests

    with pytest.raises(TargetUnavailable, match="no server is usable at present"):
        list(target.capture([task(1), task(2)], avoid={}))
    assert server.requests == requests


def test_the_continuation_is_captured_with_the_prompt_and_only_it_is_live(
    scripted: Callable[[], Any], target_over: Callable[..., SGLangTarget]
) -> None:
    server = scripted()
    orders: list[CaptureOrder] = []
    lock = threading.Lock()

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if "custom_params" not in body["sampling_params"]:
            assert body["sampling_params"]["max_new_tokens"] == 4
            assert body["sampling_params"]["stop_token_ids"] == [2]
            return 200, {"output_ids": [8, 9, 2], "meta_info": {}}
        order = decode_order(body["sampling_params"]["custom_params"][WIRE_KEY])
        assert isinstance(order, CaptureOrder)
        assert body["input_ids"] == [5] * 6 + [8, 9, 2]
        with lock:
            orders.append(order)
        return stored(body)

    server.answer = answer
    target = target_over(server, generate=GenerateSection(max_new_tokens=4))

    [generated] = target.generate([task(3)], avoid={})
    [outcome] = target.capture([task(3)], avoid={})
    [full] = target.capture([task(4, tokens=16)], avoid={})

    assert generated == Generated(task(3), [8, 9, 2], server.url)
    assert isinstance(outcome, Stored)
    assert orders[0].loss_spans == [(6, 9)]
    assert orders[0].num_tokens == 9
    assert isinstance(full, Failed)
    assert full.reason == "no room for a continuation after 16 tokens"
    assert target.health()[0].captured == 1, "a continuation and a refusal are no samples"


def test_a_prepared_target_takes_a_new_identity_and_starts_nothing(
    scripted: Callable[[], Any], target_over: Callable[..., SGLangTarget]
) -> None:
    server = scripted()
    seen: list[str] = []

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        order = decode_order(body["sampling_params"]["custom_params"][WIRE_KEY])
        assert isinstance(order, CaptureOrder)
        seen.append(order.identity.vocab_map_version)
        return stored(body)

    server.answer = answer
    target = target_over(server)
    list(target.capture([task(0)], avoid={}))
    target.prepare(
        RunIdentity(
            **{**{name: getattr(IDENTITY, name) for name in IDENTITY.__struct_fields__}, "vocab_map_version": "w"}
        )
    )
    list(target.capture([task(1)], avoid={}))

    assert seen == ["m", "w"]


@pytest.mark.parametrize("said", ["busy reply", 429, 503])
def test_a_server_that_is_behind_costs_no_prompt_an_attempt(
    scripted: Callable[[], Any], target_over: Callable[..., SGLangTarget], ledger: Ledger, said: str | int
) -> None:
    """Its writer waits for the store: every other request is turned away, and all samples come all the same."""
    server = scripted()
    reply = encode_reply(RefusedReply(reason="the server's writer is behind", retryable=True, busy=True))
    busy = (200, {"meta_info": {WIRE_KEY: [reply]}}) if isinstance(said, str) else (said, {"error": "too much"})
    turned_away: set[str] = set()

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        order = decode_order(body["sampling_params"]["custom_params"][WIRE_KEY])
        assert isinstance(order, CaptureOrder)
        if order.sample_id.endswith(("1", "5")) and order.sample_id not in turned_away:
            turned_away.add(order.sample_id)
            return busy
        return stored(body)

    server.answer = answer
    target = target_over(server, server_concurrency=4)

    outcomes = list(target.capture([task(ordinal) for ordinal in range(8)], avoid={}))

    assert len(turned_away) == 2
    assert all(isinstance(outcome, Stored) for outcome in outcomes)
    health = target.health()[0]
    assert (health.captured, health.failures, health.state) == (8, 0, "closed")
    assert any("paused" in event for event in health.events)
    assert ledger.swept == []


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_runs_nothing_for_us_is_not_the_prompts_affair(
    scripted: Callable[[], Any], target_over: Callable[..., SGLangTarget], status: int
) -> None:
    wrong, right = scripted(), scripted()
    wrong.answer = lambda body: (status, {"error": "no"})
    right.answer = stored
    target = target_over(wrong, right)

    outcomes = list(target.capture([task(ordinal) for ordinal in range(6)], avoid={}))

    assert {outcome.server for outcome in outcomes} == {right.url}
    assert all(isinstance(outcome, Stored) for outcome in outcomes)


def test_a_continuation_that_is_known_is_not_asked_for_again(
    scripted: Callable[[], Any], target_over: Callable[..., SGLangTarget]
) -> None:
    server = scripted()

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        assert "custom_params" in body["sampling_params"], "a continuation was asked for"
        assert body["input_ids"] == [5] * 6 + [8, 9, 2]
        return stored(body)

    server.answer = answer
    target = target_over(server, generate=GenerateSection(max_new_tokens=4))
    [outcome] = target.capture([msgspec.structs.replace(task(3), continuation=[8, 9, 2])], avoid={})
    assert isinstance(outcome, Stored)
