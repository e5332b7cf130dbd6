"""Child of the tests of context parallelism: ranks that share a packed row against one rank that has all of it."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from disagg_core.drafts.context import Context
from disagg_core.drafts.figures import LossOutput
from disagg_core.drafts.method import Batch, Sample
from disagg_core.training.distributed import Ranks
from tests.contract.drafts.kit import SEED, Case

CHANGES: dict[str, list[dict[str, Any]]] = {
    "eagle3": [
        {},
        {"loss": {"type": "lk_alpha"}},
        {"loss": {"type": "lk_lambda"}},
        {"loss": {"normalisation": "compat", "mask_mode": "compat"}},
        {"ttt_length": 7, "fc_norm": True},
        {"ttt_length": 1, "vocab_size": None},
    ],
    "dflash": [
        {},
        {"loss": {"type": "dpace", "label": "teacher"}},
        {"loss": {"normalisation": "sequences"}, "noise": 0.1},
        {"layer_types": "sliding", "sliding_window": 8, "anchors": 40},
    ],
    "dflash2": [{}, {"loss": {"type": "dpace_continuation"}, "anchors": 40}],
    "dspark": [{}, {"markov_head_type": "rnn"}, {"anchors": 40}],
    "p_eagle": [{}, {"num_layers": 1}, {"depths": 7}, {"sliding_window": 6}],
}
"""Options that each method is tried with besides those of its case."""
BOUND = 1e-6


def rows_of(case: Case) -> dict[str, list[Sample]]:
    """Packed rows by what is special about them; lengths are odd, so that no slice ends with a sample but by chance."""
    first, last, holes = [0] * 30 + [1] * 3, [0] * 4 + [1] * 3 + [0] * 30, [0] * 4 + [1, 0, 0, 1, 1] * 4
    return {
        "one sample, cut in the middle": [case.sample(0, 21)],
        "borders of samples and slices are the same": [case.sample(1, 16), case.sample(2, 16)],
        "borders of samples lie anywhere": [case.sample(n, t) for n, t in ((3, 17), (4, 40), (5, 5), (6, 9))],
        "all that is trained lies at one end": [case.sample(7, 33, first), case.sample(8, 37, last)],
        "the mask has holes": [case.sample(9, 24, holes), case.sample(10, 3, [0, 1, 0]), case.sample(11, 12, [1] * 12)],
        "there is less to do than there are ranks": [case.sample(12, 6, [0] * 4 + [1] * 2)],
    }


def main(name: str) -> None:
    """Compare every row of the draft method called `name`, on all ranks together."""
    torch.set_num_threads(1)
    with Ranks.join("cpu") as ranks:
        context = ranks.sharing_context(ranks.size).context
        assert context is not None
        assert_keeps_its_part(Case.of(name), context)
        for changes in CHANGES.get(name, [{}]):
            case = Case.of(name, **changes)
            for what, samples in rows_of(case).items():
                for multiple_of, checkpointing in ((1, False), (64, True)):
                    compare(case, samples, context, multiple_of, checkpointing, f"{changes}, {what}")


def assert_keeps_its_part(case: Case, context: Context) -> None:
    """Assert that what a rank keeps of a long sample for its backward pass is about its part of it."""
    batcher = case.method.batcher(case.options, case.config, seed=SEED)
    row = batcher.collate([case.sample(20, 801)], packed=True)
    normalisers = {name: torch.tensor(value) for name, value in batcher.normalisers(row).items()}
    module = case.method.loss(case.draft(), case.parts, case.options, activation_checkpointing=False)
    weights = {parameter.data_ptr() for parameter in module.parameters()}
    kept: list[dict[int, int]] = []
    for batch in (row, batcher.shared(row, context)):
        storages: dict[int, int] = {}

        def keep(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = module(batch, normalisers)
        kept.append(storages)
        output.total.backward()
    whole, part = (sum(storages.values()) for storages in kept)
    print(f"{case.method.name}: {part} bytes of {whole} are kept")
    assert part < 1.2 * whole / context.size, f"{part} bytes of {whole}"


def compare(case: Case, samples: list[Sample], context: Context, multiple_of: int, again: bool, what: str) -> None:
    """Assert that loss, figures and gradients of the ranks' parts add up to those of the whole row."""
    batcher = case.method.batcher(case.options, case.config, seed=SEED)
    row = batcher.collate(samples, packed=True, multiple_of=multiple_of)
    part = batcher.shared(row, context)
    ids, *states = zip(part.moved(), row.moved(), strict=True)
    assert ids[0].dtype == ids[1].dtype
    assert all(own.shape[1] <= whole.shape[1] for own, whole in states), what
    normalisers = {name: torch.tensor(value) for name, value in batcher.normalisers(row).items()}
    whole, expected = computed(case, row, normalisers, again)
    own, gradients = computed(case, part, normalisers, again)
    torch.testing.assert_close(
        context.sum(own.total), whole.total, rtol=BOUND, atol=BOUND, msg=lambda m: f"{what}: {m}"
    )
    for name, ratio in own.ratios.items():
        summed = type(ratio)(context.sum(ratio.numerator), context.sum(ratio.denominator))
        found = torch.tensor(summed.value())
        torch.testing.assert_close(found, torch.tensor(whole.ratios[name].value()), rtol=BOUND, atol=BOUND)
    for name, gradient in gradients.items():
        off = float((context.sum(gradient) - expected[name]).abs().max())
        assert off <= BOUND * max(1.0, float(expected[name].norm())), f"{what}: {name} is {off} off"


def computed(
    case: Case, batch: Batch, normalisers: Mapping[str, Tensor], checkpointing: bool
) -> tuple[LossOutput, dict[str, Tensor]]:
    """Return what a fresh draft says of `batch`, and all its gradients."""
    draft = case.draft()
    module = case.method.loss(draft, case.parts, case.options, activation_checkpointing=checkpointing)
    output: LossOutput = module(batch, normalisers)
    output.total.backward()
    trained = {name: parameter for name, parameter in draft.named_parameters() if parameter.requires_grad}
    return output, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}


if __name__ == "__main__":
    main(sys.argv[1])
