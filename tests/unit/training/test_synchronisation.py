"""A step is given to the device from beginning to end without waiting for it once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from disagg_core.drafts import upload
from disagg_core.drafts.method import DraftModel
from disagg_core.drafts.registry import method_names
from disagg_core.run_spec.document import TrainingSection
from disagg_core.training.distributed import Ranks, shard
from disagg_core.training.inputs import DraftBatches, DraftInput
from disagg_core.training.optimizer import Schedule
from disagg_core.training.step import OptimizerStep
from tests.contract.drafts.kit import SEED, Case
from tests.unit.training.device import PretendedDevice, watched

pytestmark = pytest.mark.unit

CASES = [(name, {}) for name in method_names()] + [
    ("eagle3", {"loss": {"type": "lk_lambda"}}),
    ("dflash", {"loss": {"label": "teacher"}}),
    ("dflash2", {"loss": {"type": "dpace"}}),
    ("dspark", {"markov_head_type": "rnn"}),
]
OPTIMIZERS = [
    pytest.param({"optimizer": "adamw"}, id="adamw"),
    pytest.param({"optimizer": "muon"}, id="muon"),
    pytest.param({"optimizer": "muon", "optimizer_offload": True}, id="muon-offloaded"),
]


class Whole:
    """A module on one rank without FSDP."""

    def set_requires_gradient_sync(self, requires_gradient_sync: bool) -> None: ...

    def set_reshard_after_backward(self, reshard_after_backward: bool) -> None: ...


def step_of(case: Case, draft: DraftModel, ranks: Ranks, *, sharded: bool, **training: Any) -> OptimizerStep:
    section = TrainingSection.model_validate({"learning_rate": 1e-3, **training})
    module = case.method.loss(draft, case.parts, case.options, activation_checkpointing=False).to(ranks.device)
    return OptimizerStep(
        module,
        shard(module, ranks, torch.float32) if sharded else Whole(),
        draft,
        method=case.method,
        batcher=case.method.batcher(case.options, case.config, seed=SEED),
        ranks=ranks,
        section=section,
        schedule=Schedule(section.learning_rate, 0.0, None),
    )


def window_of(case: Case) -> DraftBatches:
    """A packed micro-batch, one of a sample, and one with nothing to train on."""
    reads = DraftInput(case.method.batcher(case.options, case.config, seed=SEED))
    window = reads.begin()
    for samples in ([case.sample(0, 18), case.sample(1, 25)], [case.sample(2, 30)], []):
        reads.add(window, samples)
    return window


def computed_with(window: DraftBatches) -> Iterator[Tensor]:
    """The tensors of batches that leave host memory: the states."""
    for batch in window.batches:
        yield from (
            (value for value in vars(batch).values() if isinstance(value, Tensor) and value.dim() == 3) if batch else ()
        )


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> PretendedDevice:
    pretended = PretendedDevice()
    watched(pretended, monkeypatch)

    def uploaded(tensor: Tensor, device: torch.device) -> Tensor:
        there = tensor.clone()
        pretended.place([there])
        return there

    drafts = [module for name, module in sys.modules.items() if name.startswith("disagg_core.drafts.")]
    for module in drafts:
        if module is not upload and vars(module).get("uploaded") is upload.uploaded:
            monkeypatch.setattr(module, "uploaded", uploaded)
    return pretended


@pytest.mark.parametrize("training", OPTIMIZERS)
@pytest.mark.parametrize(("name", "changes"), CASES)
def test_no_operation_of_a_step_makes_the_host_wait(
    device: PretendedDevice, name: str, changes: dict[str, Any], training: dict[str, Any]
) -> None:
    case = Case.of(name, **changes)
    ranks = Ranks(0, 1, torch.device("cpu"), owns_group=False, control=None)
    step = step_of(case, case.draft(), ranks, sharded=False, **training)
    assert step.run(window_of(case), 0, samples=3, tokens=73) is not None  # what is looked at once, at the start
    window = window_of(case)
    device.place([*step._module.parameters(), *step._module.buffers(), *computed_with(window)])
    for state in step.optimizer.state.values():
        device.place(state.values())

    with device:
        queued = step.run(window, 1, samples=3, tokens=73)

    assert device.waits == []
    assert queued is not None
    result = queued.result()
    assert device.waits  # who asks for the figures waits for them
    assert result.finite


def test_the_pretended_device_sees_whoever_waits(device: PretendedDevice) -> None:
    tensor, host = torch.arange(4.0), torch.arange(4.0)
    device.place([tensor])

    with device:
        computed = (tensor * 2 + host).sum()
        _ = float(computed), bool(computed > 0), (tensor * 2).tolist(), tensor[tensor > 1], (tensor > 1).nonzero()
        found = list(device.waits)
        _ = float(host.sum()), host.tolist(), host[host > 1], host.nonzero()

    assert len(found) == 5
    assert device.waits == found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("training", OPTIMIZERS)
@pytest.mark.parametrize(("name", "changes"), CASES)
def test_no_step_on_a_gpu_synchronises(name: str, changes: dict[str, Any], training: dict[str, Any]) -> None:
    with Ranks.join("cuda") as ranks:
        case = Case.of(name, **changes)
        step = step_of(case, case.draft(), ranks, sharded=True, **training)
        for number in range(2):
            queued = step.run(window_of(case), number, samples=3, tokens=73)
            assert queued is not None
            queued.result()
        window = window_of(case)
        window.batches = [batch and batch.to(ranks.device) for batch in window.batches]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            queued = step.run(window, 2, samples=3, tokens=73)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert queued is not None
        assert queued.result().finite
