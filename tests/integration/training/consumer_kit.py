"""What the consumer's tests share: a tiny draft, samples by ordinal, a producer of them, and one fit.

Imported by name from test modules and from the child processes that they start.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disagg_core.channel import StreamingRefChannel
from disagg_core.contracts import Capture, RunIdentity, SampleRef, StreamTotals, sample_id_of
from disagg_core.drafts.eagle3 import Eagle3Config, Eagle3Draft
from disagg_core.drafts.eagle3.options import Eagle3Section, LossSection
from disagg_core.drafts.method import FrozenParts
from disagg_core.drafts.vocab import VocabMap
from disagg_core.run_spec.document import TrainingSection
from disagg_core.store import MooncakeFeatureStore
from disagg_core.training import DraftToTrain, FeatureDataLoader, Trainer, build_disagg_online_consumer
from disagg_core.training.distributed import Ranks

TARGET_HIDDEN, VOCAB, DRAFT_VOCAB, TTT = 16, 64, 32, 3


def identity_of(run_id: str, attempt: int = 1) -> RunIdentity:
    return RunIdentity(
        run_id=run_id,
        attempt=attempt,
        strategy="eagle3",
        target_model_version="target",
        tokenizer_version="tokenizer",
        vocab_map_version="map",
        draft_weight_version=0,
        capture=Capture((0, 1, 2), last_hidden_state=True),
        dtype="float32",
    )


def sample(ordinal: int) -> dict[str, Tensor]:
    """The sample of one prompt: the same bits whenever and wherever it is captured."""
    generator = torch.Generator().manual_seed(1000 + ordinal)
    tokens = 8 + ordinal * 7 % 13
    mask = torch.ones(tokens, dtype=torch.uint8)
    mask[:2] = 0
    return {
        "input_ids": torch.randint(0, VOCAB, (tokens,), generator=generator, dtype=torch.int32),
        "loss_mask": mask,
        "aux_hidden_states": torch.randn(tokens, 3 * TARGET_HIDDEN, generator=generator),
        "last_hidden_state": torch.randn(tokens, TARGET_HIDDEN, generator=generator),
    }


def draft_and_head(seed: int = 0) -> tuple[Eagle3Draft, Tensor]:
    torch.manual_seed(seed)
    config = Eagle3Config.from_dict(
        {
            "hidden_size": TARGET_HIDDEN,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": VOCAB,
            "draft_vocab_size": DRAFT_VOCAB,
            "max_position_embeddings": 64,
        }
    )
    draft = Eagle3Draft(config)
    counts = torch.arange(VOCAB) % 7
    draft.set_vocab_map(VocabMap.from_counts(counts, DRAFT_VOCAB))
    draft.set_embedding(torch.randn(VOCAB, TARGET_HIDDEN))
    return draft, torch.randn(VOCAB, TARGET_HIDDEN)


def store_samples(
    client: MooncakeFeatureStore, identity: RunIdentity, ordinals: Iterable[int], *, masked: bool = False
) -> list[SampleRef]:
    """Store the samples of `ordinals`, as the producer does; with nothing to train on if they are `masked`."""
    refs = []
    for ordinal in ordinals:
        tensors = sample(ordinal)
        if masked:
            tensors["loss_mask"] = torch.zeros_like(tensors["loss_mask"])
        refs.append(
            client.put(
                sample_id_of(ordinal),
                tensors,
                identity=identity,
                source_task_id=sample_id_of(ordinal),
                num_tokens=len(tensors["input_ids"]),
            )
        )
    return refs


def end(channel: StreamingRefChannel, refs: list[SampleRef]) -> None:
    size = sum(ref.size_bytes for ref in refs)
    channel.close(StreamTotals(refs=len(refs), bytes=size, prompts=len(refs), rejected=0))


class Attempt:
    """One attempt's channel and store, from both sides, with a rank to train on."""

    def __init__(self, endpoints, root, run_id, number=1, url=None):
        self.endpoints, self.number = endpoints, number
        self.run_id, self.identity = run_id, identity_of(run_id, number)
        self.store = MooncakeFeatureStore(endpoints, namespace=f"{run_id}/{number}", staging_bytes=4 << 20)
        self.url = url or root / "attempts" / str(number) / "channel"
        self.writer = StreamingRefChannel(self.url, run_id=run_id, attempt=number)
        self.reader = StreamingRefChannel(self.url, run_id=run_id, attempt=number)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.reader.disconnect()
        self.writer.disconnect()
        self.store.sweep()
        self.store.close()

    def told(self) -> dict[str, Any]:
        """Return what a rank in another process has to know of it."""
        return {
            "run_id": self.run_id,
            "attempt": self.number,
            "namespace": f"{self.run_id}/{self.number}",
            "store": self.endpoints.model_dump(),
            "url": str(self.url),
        }

    def stored(self, ordinals):
        return store_samples(self.store, self.identity, ordinals)

    def publish(self, ordinals, *, ended=True):
        refs = self.stored(ordinals)
        self.writer.publish_many(refs)
        if ended:
            end(self.writer, refs)
        return refs


def section(**options: Any) -> TrainingSection:
    defaults: dict[str, Any] = {"batch_size": 2, "accumulation_steps": 2, "learning_rate": 1e-2, "device": "cpu"}
    return TrainingSection(**{**defaults, **options})


def consumer(
    channel: StreamingRefChannel | None,
    store: MooncakeFeatureStore,
    ranks: Ranks,
    *,
    checkpoints: Path | None = None,
    training: TrainingSection | None = None,
    total_steps: int | None = 6,
    **options: Any,
) -> tuple[Trainer, FeatureDataLoader]:
    draft, head = draft_and_head()
    return build_disagg_online_consumer(
        channel=channel,
        store=store,
        drafts=[DraftToTrain(draft, Eagle3Section(ttt_length=TTT, loss=options.pop("loss", LossSection())))],
        parts=FrozenParts(draft.embed_tokens.weight, head),
        section=training or section(),
        total_steps=total_steps,
        ranks=ranks,
        checkpoints=checkpoints,
        identity={"run_id": "r"},
        **options,
    )
