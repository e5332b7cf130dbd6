"""The producer's costs: drive loop, capture, generation, start-up over a million prompts.

    python tests/benchmarks/bench_rollout.py [drive] [capture] [generate] [million] [--json FILE]

Bounds (printed beside the figures): the drive loop adds at most 5 % to a capture of 20 ms a sample; a capture takes at
most 1.05 times the decoder's plain forward; a million prompts start in 20 s with flat memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from disagg_core.channel import StreamingRefChannel, StreamingRefQueue
from disagg_core.contracts import Capture, PromptTask, RunIdentity
from disagg_core.engines.contract import Captured, ServerHealth
from disagg_core.engines.generation import Sampling
from disagg_core.engines.transformers import TransformersTarget
from disagg_core.prompts.checks import validate_prompts
from disagg_core.prompts.order import SeededPermutation
from disagg_core.prompts.pool import open_order
from disagg_core.rollout.producer import build_disagg_online_producer
from disagg_core.rollout.prompt_source import PromptSource
from disagg_core.run_spec.document import RolloutSection, RunSpec, TargetSection
from disagg_core.store import MooncakeFeatureStore, managed_store
from disagg_core.target.facts import read_target_facts

CAPTURE_S = 0.020
CAPTURE = Capture((0, 1, 2), last_hidden_state=True)


def identity(version: str = "t", dtype: str = "float32") -> RunIdentity:
    return RunIdentity(
        run_id="bench", attempt=1, strategy="eagle3", target_model_version=version, tokenizer_version="",
        vocab_map_version="", draft_weight_version=0, capture=CAPTURE, dtype=dtype,
    )  # fmt: skip


class SleepingTarget:
    """Takes 20 ms a sample without using the CPU, as a forward pass on a GPU does, and hands out fresh tensors."""

    concurrency = 1
    batch_size = 16

    def __init__(self, tokens: int, hidden: int) -> None:
        self._aux = torch.randn(tokens, 3 * hidden, dtype=torch.bfloat16)
        self._last = torch.randn(tokens, hidden, dtype=torch.bfloat16)
        self.waited_s = 0.0

    def capture(self, tasks, *, avoid):
        began = time.perf_counter()
        threading.Event().wait(CAPTURE_S * len(tasks))
        self.waited_s += time.perf_counter() - began
        for task in tasks:
            tensors = {
                "input_ids": torch.tensor(task.input_ids, dtype=torch.int32),
                "loss_mask": torch.tensor(task.loss_mask, dtype=torch.uint8),
                "aux_hidden_states": self._aux,
                "last_hidden_state": self._last,
            }
            yield Captured(task, tensors, len(task.input_ids), capture_s=CAPTURE_S)

    def health(self) -> list[ServerHealth]:
        return [ServerHealth("sleeping")]


def bench_drive(samples: int = 400, tokens: int = 128, hidden: int = 512) -> dict[str, float]:
    """Time the drive loop around captures of 20 ms a sample, store and channel included."""
    target = SleepingTarget(tokens, hidden)
    tasks = [
        PromptTask(ordinal=n, source=f"p:{n}", input_ids=[n % 99] * tokens, loss_mask=[1] * tokens)
        for n in range(samples)
    ]
    with (
        tempfile.TemporaryDirectory() as folder,
        managed_store(256 << 20, host="127.0.0.1", log_dir=Path(folder)) as endpoints,
        MooncakeFeatureStore(endpoints, namespace="bench/1") as store,
        StreamingRefChannel(Path(folder) / "channel", run_id="bench") as writer,
        StreamingRefChannel(Path(folder) / "channel", run_id="bench") as reader,
    ):
        consumer = threading.Thread(target=_consume, args=(reader, store), daemon=True)
        consumer.start()
        _, drive = build_disagg_online_producer(
            prompts=PromptSource.of_tasks(tasks, group=16), target=target, store=store, channel=writer,
            identity=identity(), rollout=RolloutSection(high_watermark_refs=128), window=8,
        )  # fmt: skip
        cpu, began = time.process_time(), time.perf_counter()
        drive()
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
        consumer.join(30)
        figures = drive.figures
    overhead = wall / target.waited_s - 1
    return {
        "samples": samples,
        "sample_kib": tokens * hidden * 8 / 1024,
        "wall_ms_per_sample": 1e3 * wall / samples,
        "forward_ms_per_sample": 1e3 * target.waited_s / samples,
        "cpu_ms_per_sample_with_consumer": 1e3 * cpu / samples,
        "put_ms_per_sample": 1e3 * figures["put_beside_s"] / samples,
        "publish_ms_per_sample": 1e3 * figures["publish_s"] / samples,
        "overhead_percent": 100 * overhead,
        "bound_percent": 5.0,
    }


def _consume(channel: StreamingRefChannel, store: MooncakeFeatureStore) -> None:
    queue = StreamingRefQueue(channel)
    while refs := queue.get(8):
        store.release_many(refs)
        queue.ack(refs)


def tiny_target(folder: str, **options: object) -> TransformersTarget:
    """A Llama of the demo's size: hidden 128, 4 layers, vocabulary 1024."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1024, max_position_embeddings=512, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    section = TargetSection(model=folder, dtype="float32", device="cpu")
    facts = read_target_facts(section)
    target = TransformersTarget(section, facts, CAPTURE, **options)
    target.prepare(identity(facts.version))
    return target


def random_tasks(count: int, tokens: int) -> list[PromptTask]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, 1024, (count, tokens), generator=generator).tolist()
    return [PromptTask(ordinal=n, source="", input_ids=ids, loss_mask=[1] * tokens) for n, ids in enumerate(rows)]


def bench_capture(rounds: int = 60) -> dict[str, float]:
    """Time a capture against the decoder's plain forward on the same batch, alternating."""
    with tempfile.TemporaryDirectory() as folder:
        target = tiny_target(folder)
        tasks = random_tasks(32, 128)
        ids = torch.tensor([task.input_ids for task in tasks])
        decoder = target._decoder

        def plain() -> None:
            with torch.inference_mode():
                decoder(input_ids=ids, use_cache=False)

        forward_s, capture_s = alternating(plain, lambda: list(target.capture(tasks, avoid={})), rounds)
        target.close()
    return {"forward_ms": 1e3 * forward_s, "capture_ms": 1e3 * capture_s, "ratio": capture_s / forward_s, "bound": 1.05}


def alternating(one: Callable[[], object], two: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Return the median CPU seconds of each (one thread), run in turns so that a busy machine hits both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    one(), two()
    for _ in range(rounds):
        for action, found in zip((one, two), times, strict=True):
            began = time.process_time()
            action()
            found.append(time.process_time() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def bench_generate(prompts: int = 256) -> dict[str, float]:
    """Time generation and capture at the demo's size: 64 prompt tokens, 64 new ones."""
    sampling = Sampling(max_new_tokens=64, max_tokens=128, temperature=0.0, top_p=1.0, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        target = tiny_target(folder, sampling=sampling)
        tasks = random_tasks(prompts, 64)
        groups = [tasks[n : n + target.batch_size] for n in range(0, prompts, target.batch_size)]
        list(target.capture(groups[0], avoid={}))
        began = time.perf_counter()
        for group in groups:
            list(target.generate(group, avoid={}))
        generate_s = time.perf_counter() - began
        began, cpu = time.perf_counter(), time.process_time()
        for group in groups:
            list(target.capture(group, avoid={}))
        both_s, both_cpu_s = time.perf_counter() - began, time.process_time() - cpu
        target.close()
    return {
        "generate_ms_per_prompt": 1e3 * generate_s / prompts,
        "generate_and_capture_ms_per_prompt": 1e3 * both_s / prompts,
        "seconds_for_2400_prompts": 2400 * both_s / prompts,
        "cpu_seconds_for_2400_prompts": 2400 * both_cpu_s / prompts,
        "bound_seconds": 60.0,
    }


def bench_million(count: int = 1_000_000) -> dict[str, float]:
    """Time the check of every line and the opening of a million conversations."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        answer = "this is about this and that " * 10
        with path.open("w") as file:
            for number in range(count):
                turns = [{"from": "human", "value": f"question {number}"}, {"from": "gpt", "value": answer}]
                file.write(json.dumps({"conversations": turns}) + "\n")
        spec = RunSpec.model_validate({"target": {"model": "./t"}, "data": {"prompts": str(path)}})
        before = _resident_mib()
        began, cpu = time.perf_counter(), time.process_time()
        facts = validate_prompts(spec)
        check_s, check_cpu_s = time.perf_counter() - began, time.process_time() - cpu
        began = time.perf_counter()
        order = open_order(spec)
        first = order.place(0, 0)
        open_s = time.perf_counter() - began
        began = time.perf_counter()
        for position in range(10_000):
            order.place(0, position)
        read_us = 1e6 * (time.perf_counter() - began) / 10_000
        size = path.stat().st_size
        order.close()
    assert first is not None
    assert facts.rows == count
    SeededPermutation(count, 0)
    return {
        "file_mib": size / 2**20,
        "check_every_line_s": check_s,
        "check_every_line_cpu_s": check_cpu_s,
        "open_s": open_s,
        "start_up_s": check_s + open_s,
        "bound_s": 20.0,
        "read_us_per_prompt": read_us,
        "memory_growth_mib": _resident_mib() - before,
    }


def _resident_mib() -> float:
    return psutil.Process().memory_info().rss / 2**20


BENCHES = {"drive": bench_drive, "capture": bench_capture, "generate": bench_generate, "million": bench_million}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*BENCHES, []], default=[])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {name: BENCHES[name]() for name in arguments.names or BENCHES}
    for name, figures in found.items():
        print(name)
        for figure, value in figures.items():
            print(f"  {figure:<40} {value:12.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
