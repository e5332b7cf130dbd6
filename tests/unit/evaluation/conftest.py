"""One target, prompts, their continuations, and a draft that knows most of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaForCausalLM

from disagg_core.evaluation import speculative
from tests.unit.evaluation.models import VOCAB, BlockMethod, OracleDraft, greedy, make_draft, make_target


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def target() -> LlamaForCausalLM:
    return make_target()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    lengths = [1, 2, 3, 17, 9, 30, 5, 12]
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="session")
def continuations(target: LlamaForCausalLM, prompts: list[list[int]]) -> list[list[int]]:
    return [greedy(target, prompt, 48) for prompt in prompts]


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method of `BlockDraft` is registered."""
    known = speculative.method_of
    monkeypatch.setattr(speculative, "method_of", lambda name: BlockMethod() if name == "block" else known(name))


@pytest.fixture
def oracle(target: LlamaForCausalLM, prompts: list[list[int]], continuations: list[list[int]]) -> OracleDraft:
    return OracleDraft(make_draft(target), [[*a, *b] for a, b in zip(prompts, continuations, strict=True)])
