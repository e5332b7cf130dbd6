"""What a draft is given of samples that were captured for several: the bits that it would be given alone."""

from __future__ import annotations

import pytest
import torch

from disagg_core.contracts import Capture
from disagg_core.drafts.method import Sample
from disagg_core.drafts.registry import method_names
from disagg_core.training.inputs import DraftInput, Selection
from tests.contract.drafts.kit import HIDDEN, LAYERS, SEED, Case, tiny_target

pytestmark = pytest.mark.unit


def captured(capture: Capture, tokens: int = 14) -> Sample:
    """A sample of the tiny target, as an engine captures it."""
    ids = torch.arange(3, 3 + tokens, dtype=torch.int32)
    with torch.inference_mode():
        hidden = tiny_target()(input_ids=ids[None].long(), output_hidden_states=True).hidden_states
    tensors = {
        "input_ids": ids,
        "loss_mask": torch.tensor([0] * 3 + [1] * (tokens - 3), dtype=torch.uint8),
        "aux_hidden_states": torch.cat([hidden[layer + 1][0] for layer in capture.layers], dim=1).clone(),
    }
    if capture.last_hidden_state:
        tensors["last_hidden_state"] = hidden[-1][0].clone()
    return Sample("s000000001", tensors)


@pytest.mark.parametrize("name", method_names())
def test_the_selection_of_a_sample_for_all_is_the_sample_for_one(name: str) -> None:
    case = Case.of(name)
    everything = Capture(tuple(range(LAYERS - 1)), last_hidden_state=True)

    chosen = Selection(everything, case.capture).of(captured(everything))

    alone = captured(case.capture)
    assert chosen.tensors.keys() == alone.tensors.keys()
    assert all(torch.equal(tensor, alone.tensors[key]) for key, tensor in chosen.tensors.items())
    assert chosen.tensors["aux_hidden_states"].shape == (14, len(case.capture.layers) * HIDDEN)


def test_a_draft_that_reads_everything_is_given_the_sample_itself() -> None:
    capture = Capture((0, 2), last_hidden_state=False)
    sample = captured(capture)
    assert Selection(capture, capture).of(sample) is sample


def test_every_draft_makes_micro_batches_of_its_own_from_the_same_samples() -> None:
    cases = [Case.of("eagle3"), Case.of("dflash")]
    everything = Capture(tuple(range(LAYERS - 1)), last_hidden_state=True)
    samples = [captured(everything)]
    for case in cases:
        batcher = case.method.batcher(case.options, case.config, seed=SEED)
        reads = DraftInput(batcher, Selection(everything, case.capture))
        window = reads.begin()
        reads.add(window, samples)
        reads.add(window, [])

        assert len(window.batches) == 2
        assert window.batches[1] is None
        assert window.live_positions == batcher.trainable_positions(window.batches[0])
        assert window.normalisers == {
            name: value + batcher.normalisers(None)[name]
            for name, value in batcher.normalisers(window.batches[0]).items()
        }


@pytest.mark.parametrize(
    ("packing", "lengths", "packed"),
    [("auto", (9, 14), True), ("auto", (14, 14), False), (True, (14, 14), True), (False, (9, 14), False)],
)
def test_samples_are_packed_where_padding_would_add_to_them(packing, lengths: tuple[int, int], packed: bool) -> None:
    case = Case.of("eagle3")
    reads = DraftInput(case.method.batcher(case.options, case.config, seed=SEED), packing=packing)
    window = reads.begin()

    reads.add(window, [captured(case.capture, tokens) for tokens in lengths])
    reads.add(window, [])

    batch, nothing = window.batches
    assert (batch.packing is not None) == packed
    assert batch.input_ids.shape == ((1, sum(lengths)) if packed else (2, max(lengths)))
    assert nothing is None
