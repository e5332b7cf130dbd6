"""Servers that are not started as ours are: tensor parallel, prompts in chunks, a prefix cache left on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from disagg_core.contracts import Capture
from disagg_core.engines.contract import Stored
from disagg_core.engines.servers.process import ManagedServer
from disagg_core.engines.sglang.client import SglangClient
from disagg_core.engines.sglang.launch import ServerLaunch, find_sglang_python
from disagg_core.engines.sglang.target import SGLangTarget
from disagg_core.errors import TargetError
from disagg_core.run_spec.document import TargetSection
from disagg_core.settings import get_settings
from disagg_core.store import MooncakeFeatureStore
from disagg_core.target.facts import read_target_facts
from tests.kit.waiting import eventually
from tests.sglang.support import (
    CAPTURE,
    MAX_TOKENS,
    START_TIMEOUT_S,
    Served,
    identity_of,
    random_tokens,
    task_of,
)

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(900)]


class Unlike(ServerLaunch):
    """A launch that leaves some of our flags away."""

    without: tuple[str, ...] = ()

    def command(self, *, port: int, base_gpu: int) -> list[str]:
        return [word for word in super().command(port=port, base_gpu=base_gpu) if word not in self.without]


@pytest.fixture
def serve(model_of: Callable[[str], Path], tmp_path: Path) -> Iterator[Callable[..., Served]]:
    running: list[ManagedServer] = []

    def start(
        *,
        without: tuple[str, ...] = (),
        tensor_parallel: int = 1,
        server_args: tuple[str, ...] = (),
        capture: Capture = CAPTURE,
    ) -> Served:
        directory = model_of("llama")
        section = TargetSection(
            model=str(directory),
            backend="sglang",
            dtype="float32",
            device="cpu",
            tensor_parallel=tensor_parallel,
            server_args=server_args,
        )
        facts = read_target_facts(section)
        python = find_sglang_python(get_settings())
        launch = Unlike(python, section, facts, capture, longest=MAX_TOKENS, cpu=True, host="127.0.0.1")
        object.__setattr__(launch, "without", without)
        server = ManagedServer(launch, index=0, log_dir=tmp_path)
        server.start()
        running.append(server)
        client = SglangClient("topology", server.url, timeout_s=60.0)
        eventually(
            lambda: server.exit_reason() is not None or client.healthy(20.0), "the server", within_s=START_TIMEOUT_S
        )
        client.close()
        assert server.exit_reason() is None, server.exit_reason()
        return Served(directory, section, facts, server)

    yield start
    for server in running:
        server.stop()


def test_two_ranks_and_prompts_in_chunks_give_the_same_states(
    serve: Callable[..., Served], target_of: Callable[..., SGLangTarget], store: MooncakeFeatureStore
) -> None:
    server = serve(tensor_parallel=2, server_args=("--chunked-prefill-size", "16"))
    tasks = [task_of(ordinal, random_tokens(length, seed=length)) for ordinal, length in enumerate((5, 40, 100))]
    model = AutoModelForCausalLM.from_pretrained(server.directory, dtype=torch.float32)

    for outcome in target_of(server).capture(tasks, avoid={}):
        assert isinstance(outcome, Stored), outcome
        with torch.inference_mode():
            expected = model.model(torch.tensor([outcome.task.input_ids]), output_hidden_states=True)
        sample = store.get(outcome.ref)
        aux = torch.cat([expected.hidden_states[layer + 1][0] for layer in CAPTURE.layers], dim=-1)
        torch.testing.assert_close(sample["aux_hidden_states"], aux, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sample["last_hidden_state"], expected.last_hidden_state[0], atol=1e-4, rtol=1e-4)
        store.release(outcome.ref)


@pytest.mark.parametrize("layers", [(3,), (0, 1, 2, 3, 4)])
def test_a_server_captures_any_number_of_layers(
    serve: Callable[..., Served],
    target_of: Callable[..., SGLangTarget],
    store: MooncakeFeatureStore,
    layers: tuple[int, ...],
) -> None:
    capture = Capture(layers, last_hidden_state=False)
    server = serve(capture=capture)
    task = task_of(0, random_tokens(30, seed=4))
    model = AutoModelForCausalLM.from_pretrained(server.directory, dtype=torch.float32)

    [outcome] = target_of(server, capture=capture).capture([task], avoid={})

    assert isinstance(outcome, Stored), outcome
    with torch.inference_mode():
        expected = model.model(torch.tensor([task.input_ids]), output_hidden_states=True)
    sample = store.get(outcome.ref)
    aux = torch.cat([expected.hidden_states[layer + 1][0] for layer in layers], dim=-1)
    assert list(sample) == ["input_ids", "loss_mask", "aux_hidden_states"]
    torch.testing.assert_close(sample["aux_hidden_states"], aux, atol=1e-4, rtol=1e-4)
    store.release(outcome.ref)


def test_a_server_that_caches_prefixes_is_refused(
    serve: Callable[..., Served], target_of: Callable[..., SGLangTarget], store: MooncakeFeatureStore
) -> None:
    server = serve(without=("--disable-radix-cache",))
    target = target_of(server, prepare=False)

    with pytest.raises(TargetError, match="radix cache disabled: expected True, found False"):
        target.prepare(identity_of(server.facts, store))
