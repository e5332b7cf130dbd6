"""Several drafts on one stream, and each of them alone: tiny drafts of any methods, and samples that are the same bits.

Imported by name from test modules and from the child processes that they start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disagg_core.channel import StreamingRefChannel
from disagg_core.contracts import Capture, RunIdentity, StreamTotals, sample_id_of
from disagg_core.store import MooncakeFeatureStore
from disagg_core.store.endpoints import StoreEndpoints
from disagg_core.training import DraftToTrain, FeatureDataLoader, Trainer, build_disagg_online_consumer
from disagg_core.training.distributed import Ranks
from disagg_core.training.inputs import Selection
from tests.contract.drafts.kit import HIDDEN, SEED, VOCAB, Case
from tests.integration.training.consumer_kit import section


def union_of(cases: Sequence[Case]) -> Capture:
    """What is captured for all `cases`."""
    layers = sorted({layer for case in cases for layer in case.capture.layers})
    return Capture(tuple(layers), any(case.capture.last_hidden_state for case in cases))


def tensors_of(ordinal: int, capture: Capture) -> dict[str, Tensor]:
    """The sample of one prompt: each layer's states are the same bits whichever others are captured."""

    def states(place: int) -> Tensor:
        return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1000 * place + ordinal))

    tokens = 12 + ordinal * 7 % 13
    ids = torch.randint(3, VOCAB - 1, (tokens,), generator=torch.Generator().manual_seed(ordinal), dtype=torch.int32)
    tensors = {
        "input_ids": ids,
        "loss_mask": torch.tensor([0] * 3 + [1] * (tokens - 3), dtype=torch.uint8),
        "aux_hidden_states": torch.cat([states(layer) for layer in capture.layers], dim=1),
    }
    return {**tensors, "last_hidden_state": states(99)} if capture.last_hidden_state else tensors


def identity_of(run_id: str, capture: Capture) -> RunIdentity:
    return RunIdentity(
        run_id=run_id,
        attempt=1,
        strategy="any",
        target_model_version="target",
        tokenizer_version="tokenizer",
        vocab_map_version="map",
        draft_weight_version=0,
        capture=capture,
        dtype="float32",
    )


class Stream:
    """A store and a channel with samples of what `cases` read."""

    def __init__(self, endpoints: StoreEndpoints, folder: Path, run_id: str, cases: Sequence[Case]) -> None:
        self.run_id, self.capture, self.url = run_id, union_of(cases), folder / "channel"
        self.store = MooncakeFeatureStore(endpoints, namespace=f"{run_id}/1", staging_bytes=4 << 20)
        self.writer = StreamingRefChannel(self.url, run_id=run_id)

    def publish(self, ordinals: Sequence[int]) -> None:
        """Store and publish the samples of `ordinals`, and end the stream."""
        identity, refs = identity_of(self.run_id, self.capture), []
        for ordinal in ordinals:
            name = sample_id_of(ordinal)
            tensors = tensors_of(ordinal, self.capture)
            size = len(tensors["input_ids"])
            refs.append(self.store.put(name, tensors, identity=identity, source_task_id=name, num_tokens=size))
        self.writer.publish_many(refs)
        size = sum(ref.size_bytes for ref in refs)
        self.writer.close(StreamTotals(refs=len(refs), bytes=size, prompts=len(refs), rejected=0))

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.disconnect()
        self.store.sweep()
        self.store.close()


@contextmanager
def reader_of(url: Path, run_id: str, ranks: Ranks) -> Iterator[StreamingRefChannel | None]:
    """The channel's other end, on rank 0."""
    if not ranks.is_first:
        yield None
        return
    with StreamingRefChannel(url, run_id=run_id) as reader:
        yield reader


def consumer_of(
    channel: StreamingRefChannel | None,
    store: MooncakeFeatureStore,
    ranks: Ranks,
    cases: Sequence[Case],
    *,
    captured: Capture | None = None,
    training: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Trainer, FeatureDataLoader]:
    """Trainer and loader of the drafts of `cases`; of several each has a folder of its method's name."""
    alone = len(cases) == 1
    drafts = [
        DraftToTrain(
            case.draft(),
            case.options,
            "" if alone else case.method.name,
            Selection(captured or union_of(cases), case.capture),
        )
        for case in cases
    ]
    return build_disagg_online_consumer(
        channel=channel,
        store=store,
        drafts=drafts,
        parts=cases[0].parts,
        section=section(**(training or {})),
        total_steps=6,
        ranks=ranks,
        seed=SEED,
        identity={"run_id": "r"},
        **options,
    )
