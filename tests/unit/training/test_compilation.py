"""Windows of ragged lengths are trained with a handful of compiled graphs, and to the losses of the uncompiled step.

The graphs run as torch would run them uncompiled: what is counted is how often a step is traced anew.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from disagg_core.drafts import flex
from disagg_core.drafts.dflash import dflash_loss
from disagg_core.drafts.eagle3 import own_columns, training_time_test, vocabulary
from disagg_core.drafts.registry import method_names
from disagg_core.run_spec.document import TrainingSection
from disagg_core.training.consumer import DraftToTrain, input_of, optimizer_step_of
from disagg_core.training.distributed import Ranks
from disagg_core.training.phase_clock import PhaseClock
from tests.contract.drafts.kit import SEED, Case
from tests.unit.drafts.dflash.cases import blocks_of, small_draft
from tests.unit.drafts.dflash.cases import small_batch as dflash_batch
from tests.unit.drafts.eagle3.cases import small_batch as eagle3_batch
from tests.unit.drafts.eagle3.cases import small_draft as small_eagle3
from tests.unit.drafts.eagle3.cases import target_head

pytestmark = pytest.mark.unit

MOST_GRAPHS = 8
"""As docs/speed.md says; torch itself gives up on a function after as many."""
WINDOWS = 40


@pytest.fixture
def compiled() -> Iterator[CompileCounter]:
    """Have all compilations counted, beginning without any."""
    torch._dynamo.reset()
    counter = CompileCounter()
    with torch.compiler.set_stance("default", force_backend=counter):
        yield counter
    torch._dynamo.reset()


@pytest.fixture
def alone() -> Iterator[Ranks]:
    with Ranks.join("cpu") as ranks:
        yield ranks


def ragged(most: int, *, seed: int = 0) -> Iterator[list[int]]:
    """Lengths of the samples of one window after the other."""
    drawn = random.Random(seed)
    while True:
        yield [drawn.randrange(6, most) for _ in range(drawn.choice([1, 2, 3]))]


def losses_of(name: str, ranks: Ranks, *, compile: bool) -> list[float]:
    """Train a draft on ragged windows as a consumer would; return the loss of each."""
    case = Case.of(name)
    section = TrainingSection(learning_rate=1e-3, compile=compile, warmup_ratio=0)
    draft = DraftToTrain(case.draft(), case.options)
    batcher = case.method.batcher(case.options, case.config, seed=SEED)
    step = optimizer_step_of(draft, case.parts, ranks, section, batcher, None, PhaseClock())
    reads = input_of(draft, batcher, section)
    losses, lengths = [], ragged(160)
    for number in range(WINDOWS):
        window = reads.begin()
        samples = [case.sample(10 * number + place, tokens) for place, tokens in enumerate(next(lengths))]
        reads.add(window, samples)
        queued = step.run(window, number, samples=len(samples), tokens=sum(map(len, samples)))
        assert queued is not None
        losses.append(queued.result().loss)
    return losses


@pytest.mark.parametrize(
    "name",
    [name if name == "eagle3" else pytest.param(name, marks=pytest.mark.slow) for name in method_names()],
)
def test_forty_windows_of_ragged_lengths_take_a_handful_of_graphs(
    name: str, alone: Ranks, compiled: CompileCounter
) -> None:
    plain = losses_of(name, alone, compile=False)
    assert compiled.frame_count == 0

    found = losses_of(name, alone, compile=True)

    assert 0 < compiled.frame_count <= MOST_GRAPHS
    assert found == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("name", [pytest.param("eagle3", marks=pytest.mark.slow), "dflash"])
def test_flex_attention_is_compiled_for_no_batch_anew(
    name: str, compiled: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where it is always compiled. Without gradients: PyTorch has no backward pass of it for CPUs."""
    monkeypatch.setattr(flex, "compiles", lambda device: True)
    lengths = ragged(150, seed=1)
    with torch.no_grad():
        for _ in range(10):
            pay_attention(name, next(lengths))

    assert 0 < compiled.frame_count <= MOST_GRAPHS


def test_what_a_gpu_fuses_of_an_eagle3_step_is_compiled_for_no_batch_anew(
    compiled: CompileCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (own_columns, vocabulary):
        monkeypatch.setattr(module, "compiles", lambda device: True)
    draft, lengths = small_eagle3(head_dim=16), ragged(150, seed=2)
    for _ in range(10):
        batch = eagle3_batch(draft, [next(lengths)[0]] * 2)
        training_time_test(draft, batch, lm_head=target_head(draft), ttt_length=4, attention="flash").total.backward()

    assert 0 < compiled.frame_count <= MOST_GRAPHS


def pay_attention(name: str, lengths: list[int]) -> None:
    if name == "eagle3":
        eagle3 = small_eagle3(head_dim=16)
        batch = eagle3_batch(eagle3, lengths)
        training_time_test(eagle3, batch, lm_head=target_head(eagle3), ttt_length=1, attention="flex")
    else:
        dflash = small_draft(head_dim=16)
        batch = dflash_batch(dflash.config, lengths, anchors=max(2, lengths[0] // 12))
        dflash_loss(dflash, batch, **blocks_of(batch), attention="flex")
