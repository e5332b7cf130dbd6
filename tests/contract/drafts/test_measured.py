"""Every draft method can be measured on held-out samples between its steps, which changes none of them."""

from __future__ import annotations

import torch

from disagg_core.training.distributed import Ranks
from disagg_core.training.state import gather_weights
from tests.contract.drafts.kit import Case
from tests.integration.training.method_rank_main import step_of, window_of


def trained(case: Case, ranks: Ranks, *, measured: bool) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Two steps; what comes of them, and what was measured after each."""
    draft, found = case.draft(), []
    step = step_of(case, draft, ranks)
    held_out, _ = window_of(case, [(7, 20), (8, 11)])
    torch.manual_seed(3)
    for number in range(2):
        batches, counts = window_of(case, [(2 * number, 18), (2 * number + 1, 25)])
        assert step.run(batches, number, **counts) is not None
        if measured:
            found += [step.measure(held_out), step.measure(held_out)]
    return gather_weights(draft, draft.serving_state_dict()), found


def test_measuring_is_repeatable_and_changes_no_bit(case: Case) -> None:
    with Ranks.join("cpu") as ranks:
        with torch.random.fork_rng():
            expected, _ = trained(case, ranks, measured=False)
        with torch.random.fork_rng():
            weights, found = trained(case, ranks, measured=True)

    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert found[0] != found[2], "the weights are others after a step"
    assert {"loss", "accuracies", "simulated_accept_length"} <= found[0].keys()
