"""A real server's samples: their numbers, their references, and what becomes of prompts that cannot be captured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from disagg_core.contracts import Capture, SampleRef
from disagg_core.engines.contract import Captured, Failed, Generated, Stored
from disagg_core.engines.servers.wire import WIRE_KEY, CaptureOrder, StoreAddress, encode_order
from disagg_core.engines.sglang.client import SglangClient
from disagg_core.engines.sglang.target import SGLangTarget
from disagg_core.engines.transformers import TransformersTarget
from disagg_core.errors import TargetError
from disagg_core.run_spec.document import GenerateSection
from disagg_core.store import MooncakeFeatureStore, NewSample
from disagg_core.target.facts import model_fingerprint
from tests.sglang.support import CAPTURE, MAX_TOKENS, VOCABULARY, Served, identity_of, random_tokens, task_of

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]

ServedOf = Callable[[str], Served]
TargetOf = Callable[..., SGLangTarget]


def expected_states(
    directory: Path, input_ids: list[int], layers: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        output = model.model(torch.tensor([input_ids]), output_hidden_states=True)
    return torch.cat([output.hidden_states[layer + 1][0] for layer in layers], dim=-1), output.last_hidden_state[0]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_states_are_those_of_transformers(
    served: ServedOf, target_of: TargetOf, store: MooncakeFeatureStore, family: str
) -> None:
    server = served(family)
    shared = random_tokens(48, seed=7)
    prompts = [random_tokens(length, seed=length) for length in (1, 7, 33, 120, MAX_TOKENS)]
    prompts += [shared + random_tokens(tail, seed=100 + tail) for tail in (1, 9, 30)] + [list(shared), list(shared)]
    tasks = [task_of(ordinal, prompt) for ordinal, prompt in enumerate(prompts)]

    outcomes = list(target_of(server).capture(tasks, avoid={}))

    assert sorted(outcome.task.ordinal for outcome in outcomes) == list(range(len(tasks)))
    for outcome in outcomes:
        assert isinstance(outcome, Stored), outcome
        sample = store.get(outcome.ref)
        aux, last = expected_states(server.directory, outcome.task.input_ids, CAPTURE.layers)
        torch.testing.assert_close(sample["aux_hidden_states"], aux, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sample["last_hidden_state"], last, atol=1e-5, rtol=1e-5)
        assert sample["input_ids"].tolist() == outcome.task.input_ids
        assert sample["loss_mask"].tolist() == outcome.task.loss_mask
        assert sample["input_ids"].dtype == torch.int32
        assert sample["loss_mask"].dtype == torch.uint8
        store.release(outcome.ref)


def test_a_sample_holds_no_last_hidden_state_where_none_is_wanted(
    served: ServedOf, target_of: TargetOf, store: MooncakeFeatureStore
) -> None:
    server = served("llama")
    capture = Capture(CAPTURE.layers, last_hidden_state=False)
    task = task_of(0, random_tokens(40, seed=3))

    [outcome] = target_of(server, capture=capture).capture([task], avoid={})

    assert isinstance(outcome, Stored), outcome
    sample = store.get(outcome.ref)
    aux, _ = expected_states(server.directory, task.input_ids, CAPTURE.layers)
    assert {name: (tuple(tensor.shape), str(tensor.dtype)[6:]) for name, tensor in sample.items()} == capture.features(
        40, server.facts.hidden_size, "float32"
    )
    torch.testing.assert_close(sample["aux_hidden_states"], aux, atol=1e-5, rtol=1e-5)
    store.release(outcome.ref)


def test_a_consumer_cannot_tell_the_backends_apart(
    served: ServedOf, target_of: TargetOf, store: MooncakeFeatureStore
) -> None:
    server = served("qwen3")
    identity = identity_of(server.facts, store)
    local = TransformersTarget(server.section, server.facts, CAPTURE, batch_tokens=256, sampling=None)
    local.prepare(identity)
    task = task_of(3, random_tokens(50, seed=5))

    [captured] = local.capture([task], avoid={})
    [stored] = target_of(server).capture([task], avoid={})

    assert isinstance(captured, Captured)
    assert isinstance(stored, Stored)
    [ours] = store.put_many(
        [NewSample(task.sample_id, captured.tensors, task.source, captured.num_tokens, {"server": captured.server})],
        identity=identity,
    )
    different = {"key", "crc32", "metadata"}  # the numbers may differ in their last bits, and so the checksum
    fields = [name for name in SampleRef.__struct_fields__ if name not in different]
    assert {name: getattr(ours, name) for name in fields} == {name: getattr(stored.ref, name) for name in fields}
    assert stored.ref.metadata["server"] == server.url
    left, right = store.get(ours), store.get(stored.ref)
    assert list(left) == list(right)
    for name in left:
        assert left[name].dtype == right[name].dtype
        torch.testing.assert_close(left[name], right[name], atol=1e-5, rtol=1e-5)
    store.release_many([ours, stored.ref])
    local.close()


def test_prompt_and_greedy_continuation_are_captured_together(
    served: ServedOf, target_of: TargetOf, store: MooncakeFeatureStore
) -> None:
    server = served("llama")
    target = target_of(server, generate=GenerateSection(max_new_tokens=12))
    task = task_of(0, random_tokens(20, seed=1))
    model = AutoModelForCausalLM.from_pretrained(server.directory, dtype=torch.float32)
    greedy = model.generate(torch.tensor([task.input_ids]), max_new_tokens=12, do_sample=False)[0].tolist()

    [continuation] = target.generate([task], avoid={})
    [outcome] = target.capture([task], avoid={})

    assert isinstance(continuation, Generated)
    assert task.input_ids + continuation.tokens == greedy
    assert isinstance(outcome, Stored)
    sample = store.get(outcome.ref)
    assert sample["input_ids"].tolist() == greedy
    assert sample["loss_mask"].tolist() == [0] * 20 + [1] * len(continuation.tokens)
    store.release(outcome.ref)


def test_a_prompt_that_cannot_be_captured_is_refused_and_the_server_goes_on(
    served: ServedOf, target_of: TargetOf, store: MooncakeFeatureStore
) -> None:
    target = target_of(served("llama"))
    too_long = task_of(0, random_tokens(400, seed=1))
    unknown_token = task_of(1, [5, VOCABULARY, 6])
    good = task_of(2, random_tokens(30, seed=2))

    outcomes = {outcome.task.ordinal: outcome for outcome in target.capture([too_long, unknown_token, good], avoid={})}

    assert isinstance(outcomes[0], Failed)
    assert not outcomes[0].retryable
    assert "256" in outcomes[0].reason or "context" in outcomes[0].reason
    assert isinstance(outcomes[1], Failed)
    assert f"token id {VOCABULARY} is not of the target" in outcomes[1].reason
    assert isinstance(outcomes[2], Stored)
    store.release(outcomes[2].ref)
    assert [server.state for server in target.health()] == ["closed"]


def test_an_error_in_the_capture_is_an_answer_and_not_the_end_of_the_server(
    served: ServedOf, target_of: TargetOf, store: MooncakeFeatureStore
) -> None:
    server = served("llama")
    target = target_of(server)
    client = SglangClient("raw", server.url, timeout_s=60.0)
    address = StoreAddress(
        master_address=store.endpoints.master_address,
        metrics_address=store.endpoints.metrics_address,
        namespace="another/1",
        protocol="tcp",
        checksum=True,
        put_timeout_s=5.0,
    )
    order = CaptureOrder(
        sample_id="s000000000",
        source_task_id="s000000000",
        server="raw",
        fingerprint=model_fingerprint(server.facts.model, None),
        num_tokens=3,
        loss_spans=[(0, 3)],
        identity=identity_of(server.facts, store),
        store=address,
        deadline=client.server_time(60.0),
    )
    unreadable = {WIRE_KEY: encode_order(order)[WIRE_KEY].replace("deadline", "limit")}
    sampling = {"max_new_tokens": 1, "temperature": 0, "custom_params": unreadable}
    body = {"input_ids": [5, 6, 7], "return_hidden_states": True, "sampling_params": sampling}

    with pytest.raises(Exception, match="identity of another/1"):
        client.capture([5, 6, 7], order)
    with pytest.raises(Exception, match="expected 3 rows of states for 4 prompt tokens"):
        client.capture([5, 6, 7, 8], order)
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=60.0).json()
    [outcome] = target.capture([task_of(0, [5, 6, 7])], avoid={})

    assert "cannot be read" in answer["meta_info"][WIRE_KEY][0]
    assert isinstance(outcome, Stored)
    store.release(outcome.ref)
    client.close()


def test_a_sample_that_comes_too_late_is_removed_again(
    served: ServedOf, target_of: TargetOf, store: MooncakeFeatureStore
) -> None:
    server = served("llama")
    client = SglangClient("raw", server.url, timeout_s=60.0)
    order = CaptureOrder(
        sample_id="s000000000",
        source_task_id="s000000000",
        server="raw",
        fingerprint=model_fingerprint(server.facts.model, None),
        num_tokens=3,
        loss_spans=[(0, 3)],
        identity=identity_of(server.facts, store),
        store=StoreAddress(
            master_address=store.endpoints.master_address,
            metrics_address=store.endpoints.metrics_address,
            namespace=store.namespace,
            protocol="tcp",
            checksum=True,
            put_timeout_s=5.0,
        ),
        deadline=client.server_time(-1.0),
    )

    with pytest.raises(Exception, match="time was over"):
        client.capture([5, 6, 7], order)

    client.close()
    assert store.key_count() == 0


def test_mixed_servers_are_refused_before_the_first_sample(
    served: ServedOf, target_of: TargetOf, store: MooncakeFeatureStore
) -> None:
    llama, qwen = served("llama"), served("qwen3")
    target = target_of(llama, (llama.url, qwen.url), prepare=False)

    with pytest.raises(TargetError, match="model type: expected llama, found qwen3") as refusal:
        target.prepare(identity_of(llama.facts, store))

    assert qwen.url in str(refusal.value)
    assert llama.url not in str(refusal.value)


def test_a_server_that_captures_other_layers_is_refused(
    served: ServedOf, target_of: TargetOf, store: MooncakeFeatureStore
) -> None:
    llama = served("llama")
    with pytest.raises(TargetError, match=r"captured layers: expected \[1, 3, 5\], found \[0, 2, 4\]"):
        target_of(llama, capture=Capture((1, 3, 5), last_hidden_state=True))
