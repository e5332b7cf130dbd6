"""Decoding in transformers' models: the numbers of a plain forward pass, without the copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from disagg_core.engines.decoding import attention_by_groups, cache_for
from disagg_core.run_spec.document import TargetSection
from disagg_core.target.facts import read_target_facts
from disagg_core.target.loading import load_target

pytestmark = pytest.mark.unit

ROWS, PROMPT, STEPS = 6, 9, 5


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("grouped")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def model(model_dir: Path) -> Any:
    section = TargetSection(model=str(model_dir), device="cpu", dtype="float32")
    return load_target(section, read_target_facts(section))


def logits_of(model: Any, cache: DynamicCache, rows: list[int] | None = None) -> list[torch.Tensor]:
    """Return the last logits of padded prompts and of each of some steps; from the third on only of `rows`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 512, (ROWS, PROMPT + STEPS), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(ROWS):
        mask[row, :row] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    found = []
    with torch.no_grad():
        for step in range(STEPS):
            if step == 2 and rows is not None:
                cache.batch_select_indices(torch.tensor(rows))
                ids, mask, positions = ids[rows], mask[rows], positions[rows]
            fed = slice(0, PROMPT) if step == 0 else slice(PROMPT + step - 1, PROMPT + step)
            output = model(
                input_ids=ids[:, fed],
                attention_mask=mask[:, : fed.stop],
                position_ids=positions[:, fed],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            found.append(output.logits[:, -1])
    return found


@pytest.mark.parametrize("room", [0, 2, STEPS])
@pytest.mark.parametrize("rows", [None, [0, 3, 5]])
def test_a_step_gives_what_transformers_own_cache_and_attention_give(
    model: Any, room: int, rows: list[int] | None
) -> None:
    expected = logits_of(model, DynamicCache(config=model.config), rows)
    with attention_by_groups(model):
        found = logits_of(model, cache_for(model.config, room), rows)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_a_cache_with_room_is_not_copied_at_a_step(model: Any) -> None:
    cache = cache_for(model.config, STEPS)
    logits_of(model, cache)
    before = cache.layers[0].keys.data_ptr()
    assert cache.layers[0].keys.shape[2] == PROMPT + STEPS - 1
    with torch.no_grad():
        model(input_ids=torch.zeros(ROWS, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert cache.layers[0].keys.data_ptr() == before


def test_the_head_gets_no_slices_with_gaps(model: Any) -> None:
    """Of such a one torch copies a frozen weight for each row, inside the operator where nobody sees it."""
    given: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_hook(lambda _, arguments, output: given.append(arguments[0]))
    with torch.no_grad():
        model(input_ids=torch.zeros(ROWS, PROMPT, dtype=torch.long), logits_to_keep=1)
    assert given[0].shape == (ROWS, 1, 48)
    assert given[0].is_contiguous()
