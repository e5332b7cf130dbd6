"""A capture on one GPU beside a plain prefill of the same batch, shapes of Qwen3-8B, bf16.

    python -m tests.benchmarks.gpu.capture [--draft eagle3|dflash2|all] [--json FILE] [--tiny]

Both take turns on one model of random weights: the prefill is the decoder's forward pass alone, the capture also takes
the states to the CPU, trimmed, into memory that the store would send from. Wanted: at least 0.95 of the prefill's rate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from disagg_core.bench.result import Figure, Result
from disagg_core.bench.scene import bench_of
from disagg_core.contracts import PromptTask
from disagg_core.engines.transformers import TransformersTarget
from disagg_core.run_spec.document import TargetSection
from disagg_core.store.outgoing import Shapes
from disagg_core.target.layers import find_decoder
from tests.benchmarks.gpu.common import Scale, arguments, drafts_of, scale_of, show


def measure(method: str, scale: Scale) -> Result:
    bench = bench_of(method, scale.shape, device=scale.device)
    facts, model = scale.shape.facts(), scale.shape.model(scale.device).eval()
    section = TargetSection(model=facts.model, device=scale.device)
    total = scale.batch * scale.tokens
    target = TransformersTarget(section, facts, bench.capture, batch_tokens=total, model=model, allocate=pinned)
    target.prepare(bench.identity())
    tasks = [
        PromptTask(ordinal=n, source="", input_ids=[2 + n] * scale.tokens, loss_mask=[1] * scale.tokens)
        for n in range(scale.batch)
    ]
    ids = torch.tensor([task.input_ids for task in tasks], device=scale.device)
    decoder = find_decoder(model).module

    def plain() -> None:
        with torch.inference_mode():
            decoder(input_ids=ids, use_cache=False)

    prefill_s, capture_s = in_turns(plain, lambda: list(target.capture(tasks, avoid={})), scale)
    target.close()
    ratio = prefill_s / capture_s
    size = total * bench.capture.bytes_per_token(scale.shape.hidden, scale.shape.dtype)
    figures = [
        Figure("plain prefill", total / prefill_s, "tokens/s"),
        Figure("capture", total / capture_s, "tokens/s", ratio, "the prefill", ">= 0.95", ratio >= 0.95),
        Figure("captured", size / capture_s / 1e9, "GB/s"),
    ]
    setting = f"{method}, {scale.shape.name}, batch {scale.batch} x {scale.tokens}, {scale.device}"
    return Result("capture", setting, figures)


def pinned(shapes: Shapes, filled_from: torch.device) -> dict[str, Tensor]:
    """Return page-locked tensors for what comes from a GPU, as a store's own memory is."""
    locked = filled_from.type == "cuda"
    return {name: torch.empty(shape, dtype=dtype, pin_memory=locked) for name, (shape, dtype) in shapes.items()}


def in_turns(one: Callable[[], object], two: Callable[[], object], scale: Scale) -> tuple[float, float]:
    """Median seconds of each, run in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(scale.steps + 2):
        for action, found in zip((one, two), times, strict=True):
            settle(scale)
            began = time.perf_counter()
            action()
            settle(scale)
            if number >= 2:
                found.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])


def settle(scale: Scale) -> None:
    if scale.device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    options = arguments(__doc__).parse_args()
    scale = scale_of(options)
    show([measure(method, scale) for method in drafts_of(options)], options.json)


if __name__ == "__main__":
    main()
