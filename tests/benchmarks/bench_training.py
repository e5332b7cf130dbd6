"""How much the consumer costs beside its arithmetic: the demo's shape, over a real store and channel.

    python tests/benchmarks/bench_training.py [--steps 300] [--hidden 96] [--tokens 128]

Trains a draft on random samples from a real Mooncake store through a real channel, then runs the same batches through
the bare loss, backward and AdamW on plain tensors. The ratio is what loader, store, channel, FSDP2 and bookkeeping add.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from disagg_core.channel import StreamingRefChannel
from disagg_core.contracts import Capture, RunIdentity, StreamTotals, sample_id_of
from disagg_core.drafts.eagle3 import Eagle3Config, Eagle3Draft, Eagle3Loss
from disagg_core.drafts.eagle3.options import LossSection
from disagg_core.drafts.vocab import VocabMap
from disagg_core.run_spec.document import TrainingSection
from disagg_core.store import MooncakeFeatureStore, NewSample, managed_store
from disagg_core.training import build_disagg_online_consumer
from disagg_core.training.loader import collate

VOCAB, BATCH, TTT, AHEAD = 1024, 8, 4, 64


def draft_of(hidden: int) -> tuple[Eagle3Draft, Tensor]:
    """Return a fresh draft of the demo's shape and a random LM head."""
    torch.manual_seed(0)
    config = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_attention_heads": 4, "vocab_size": VOCAB}
    draft = Eagle3Draft(Eagle3Config.from_dict(config))
    draft.set_vocab_map(VocabMap.identity(VOCAB))
    draft.set_embedding(torch.randn(VOCAB, hidden))
    return draft, torch.randn(VOCAB, hidden)


def samples_of(count: int, hidden: int, tokens: int) -> list[dict[str, Tensor]]:
    """Return random samples of up to `tokens` tokens, the second half of each trained on."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for number in range(count):
        length = tokens - number % 16
        samples.append(
            {
                "input_ids": torch.randint(0, VOCAB, (length,), generator=generator, dtype=torch.int32),
                "loss_mask": (torch.arange(length) >= length // 2).to(torch.uint8),
                "aux_hidden_states": torch.randn(length, 3 * hidden, generator=generator),
                "last_hidden_state": torch.randn(length, hidden, generator=generator),
            }
        )
    return samples


def through_the_system(steps: int, hidden: int, samples: list[dict[str, Tensor]]) -> tuple[float, float, float]:
    """Return wall seconds, CPU seconds and seconds waited for data of a fit of `steps` steps."""
    identity = RunIdentity(
        run_id="bench",
        attempt=1,
        strategy="eagle3",
        target_model_version="",
        tokenizer_version="",
        vocab_map_version="",
        draft_weight_version=0,
        capture=Capture((0, 1, 2), last_hidden_state=True),
        dtype="float32",
    )
    with (
        tempfile.TemporaryDirectory() as directory,
        managed_store(2 << 30, log_dir=Path(directory) / "logs") as endpoints,
        MooncakeFeatureStore(endpoints, namespace="bench/1") as store,
        StreamingRefChannel(Path(directory) / "channel", run_id="bench") as writer,
        StreamingRefChannel(Path(directory) / "channel", run_id="bench") as reader,
    ):
        refs = store.put_many(
            [
                NewSample(sample_id_of(i), samples[i % len(samples)], "t", len(samples[i % len(samples)]["input_ids"]))
                for i in range(steps * BATCH)
            ],
            identity=identity,
        )
        writer.publish_many(refs)
        size = sum(ref.size_bytes for ref in refs)
        writer.close(StreamTotals(refs=len(refs), bytes=size, prompts=len(refs), rejected=0))
        draft, head = draft_of(hidden)
        trainer, loader = build_disagg_online_consumer(
            channel=reader,
            store=store,
            draft=draft,
            lm_head=head,
            section=TrainingSection(batch_size=BATCH, learning_rate=1e-3, device="cpu", prefetch_samples=AHEAD),
            ttt_length=TTT,
            total_steps=steps,
        )
        cpu = time.process_time()
        outcome = trainer.fit(loader)
        return outcome.seconds, time.process_time() - cpu, outcome.data_wait_s


def bare(steps: int, hidden: int, samples: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Return wall and CPU seconds of the same arithmetic on plain tensors in memory."""
    draft, head = draft_of(hidden)
    loss = Eagle3Loss(draft, head, LossSection(), TTT)
    parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    batches = [collate(samples[i : i + BATCH]) for i in range(0, len(samples), BATCH)]
    wall, cpu = time.perf_counter(), time.process_time()
    for step in range(steps):
        loss(batches[step % len(batches)]).total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--hidden", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=128)
    told = parser.parse_args()
    torch.set_num_threads(1)
    samples = samples_of(16 * BATCH, told.hidden, told.tokens)
    bare(5, told.hidden, samples)
    plain_wall, plain_cpu = bare(told.steps, told.hidden, samples)
    wall, cpu, waited = through_the_system(told.steps, told.hidden, samples)
    print(f"{told.steps} steps of {BATCH} x {told.tokens} tokens, hidden {told.hidden}, K = V = {VOCAB}, L = {TTT}")
    print(f"{'':24}{'wall s':>9}{'cpu s':>9}{'ms/step':>9}{'steps/s':>9}")
    for name, seconds, used in (("arithmetic alone", plain_wall, plain_cpu), ("the whole consumer", wall, cpu)):
        row = f"{name:24}{seconds:9.1f}{used:9.1f}{1e3 * seconds / told.steps:9.1f}{told.steps / seconds:9.1f}"
        print(row)
    print(f"waited for data {waited:.1f} s ({100 * waited / wall:.0f} %); cpu ratio {cpu / plain_cpu:.2f}")


if __name__ == "__main__":
    main()
