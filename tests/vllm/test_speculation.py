"""An exported draft in a stock vLLM: it drafts there as it does here.

vLLM shares with the target what a file lacks and runs with what its own configs make of ours, so the only proof that it
runs our draft is that it keeps as many drafted tokens as our own decoder does, place by place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disagg_core.evaluation import measure_accept_length
from tests.vllm.support import DRAFT_TOKENS, MASK, NEW_TOKENS, Target, decode, export_learned

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

OPTIONS: dict[str, dict[str, Any]] = {
    "dflash": {"block_size": DRAFT_TOKENS + 1, "num_layers": 2, "mask_token_id": MASK, "anchors": 24},
    "eagle3": {"vocab_size": 240, "ttt_length": DRAFT_TOKENS},
}
BY_METHOD = {"dflash": ("sglang", "speculators"), "eagle3": ("speculators",)}
"""Of each method the formats that vLLM loads."""


@pytest.mark.parametrize("method", BY_METHOD)
def test_vllm_keeps_as_many_of_the_exported_drafts_tokens_as_our_own_decoder(
    method: str, target: Target, tmp_path: Path
) -> None:
    exports = export_learned(target, tmp_path / "drafts", method, OPTIONS[method], BY_METHOD[method])
    for format, exported in exports.items():
        own = measure_accept_length(
            target.model, exported.draft, target.prompts, draft_tokens=DRAFT_TOKENS, max_new_tokens=NEW_TOKENS
        )
        assert own.lossless
        assert 1.5 < own.accept_length < DRAFT_TOKENS, "neither too bad a draft nor a perfect one tells much"

        served = decode(target, exported.path, format, method, tmp_path / format)

        assert served.tokens == target.continuations
        counted = served.counters
        # A pass that runs past the end counts whole, here and there. Both compute the same in fp32 but sum in another
        # order; only where two logits of the draft are equal but for their last bits can they draft other tokens.
        assert counted["num_draft_tokens"] == DRAFT_TOKENS * counted["num_drafts"]
        assert counted["num_drafts"] == pytest.approx(own.target_passes, abs=1), format
        per_position = np.array(counted["num_accepted_tokens_per_pos"]) / counted["num_drafts"]
        assert per_position == pytest.approx(own.per_position, abs=1.01 / own.target_passes), format
        accept_length = 1 + counted["num_accepted_tokens"] / counted["num_drafts"]
        assert accept_length == pytest.approx(own.accept_length, abs=1.01 / own.target_passes), format
