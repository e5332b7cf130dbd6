"""The whole pair on one GPU: a Qwen3-8B of random weights captures, its draft trains, bf16, both at once and alone.

    python -m tests.benchmarks.gpu.pair [--draft eagle3|dflash2|all] [--json FILE] [--tiny]

On one card the two share its time: both at once can come to at most 1 / (1/capture + 1/training) samples a second, and
what the figure says is how close they come to that. The card has to hold the target, the draft with its optimizer, and
the batches of both: about 16 + 8 GB and activations.
"""

from __future__ import annotations

from dataclasses import replace

from disagg_core.bench.pipeline import PipelineSetting, bench_pipeline
from disagg_core.bench.result import Figure, Result
from tests.benchmarks.gpu.common import Scale, arguments, drafts_of, scale_of, show


def measure(method: str, scale: Scale) -> Result:
    setting = PipelineSetting(
        method=method,
        shape=scale.shape,
        tokens=scale.tokens,
        samples=scale.batch * (scale.steps + 2),
        batch=scale.batch,
        cost="model",
        watermark=8 * scale.batch,
        batch_tokens=scale.batch * scale.tokens,
        device=scale.device,
    )
    found = bench_pipeline(setting)
    training, capture, pair = (figure.value for figure in found.figures[:3])
    shared = 1 / (1 / training + 1 / capture)
    both = Figure("both at once", pair, "samples/s", pair / shared, "one card shared without a loss")
    tokens = Figure("both at once", pair * scale.tokens, "tokens/s")
    return replace(found, figures=[*found.figures[:2], both, tokens, *found.figures[3:]])


def main() -> None:
    options = arguments(__doc__).parse_args()
    scale = scale_of(options)
    show([measure(method, scale) for method in drafts_of(options)], options.json)


if __name__ == "__main__":
    main()
