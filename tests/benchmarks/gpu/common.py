"""What the GPU benchmarks share: shapes, the card's peak, operations of a step by formula, tables and JSON."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from disagg_core.bench.result import Result, as_document, as_table, machine
from disagg_core.bench.scene import QWEN3_8B, TINY, Shape
from disagg_core.drafts.registry import method_of
from disagg_core.run_spec.document import TrainingSection

DRAFTS = ("eagle3", "dflash2")
PEAKS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}
"""Dense bf16 peaks of the SXM cards, 10^12 operations a second, as their data sheets say."""


@dataclass(frozen=True)
class Scale:
    """Shapes of one run: those of Qwen3-8B on a GPU, tiny ones on the CPU to see that a script works."""

    shape: Shape
    device: str
    tokens: int
    batch: int
    steps: int
    peak_tflops: float
    compile: bool = False

    @property
    def section(self) -> TrainingSection:
        precision = "bfloat16" if self.shape.dtype == "bfloat16" else "float32"
        return TrainingSection(batch_size=self.batch, device=self.device, precision=precision, compile=self.compile)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draft", choices=[*DRAFTS, "all"], default="all")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--peak-tflops", type=float, help="the card's dense bf16 peak; known of A100, H100, H200, B200")
    parser.add_argument("--compile", action="store_true", help="training.compile: norms and MLPs too")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU: to see that the script works")
    parser.add_argument("--json", type=Path)
    return parser


def scale_of(options: argparse.Namespace) -> Scale:
    if options.tiny:
        torch.set_num_threads(1)
        return Scale(TINY, "cpu", 48, 2, 3, 0.05, options.compile)
    if not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device, found none; --tiny runs tiny shapes on the CPU")
    name = torch.cuda.get_device_name()
    peak = options.peak_tflops or next((peak for card, peak in PEAKS.items() if card in name), None)
    if peak is None:
        raise SystemExit(f"the peak of {name} is not known; give --peak-tflops")
    return Scale(QWEN3_8B, "cuda", options.tokens, options.batch, options.steps, peak, options.compile)


def drafts_of(options: argparse.Namespace) -> list[str]:
    return list(DRAFTS) if options.draft == "all" else [options.draft]


def show(results: list[Result], document: Path | None) -> None:
    facts = machine()
    console = Console(width=140)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for result in results:
        console.print(as_table(result))
    if document is not None:
        document.write_text(json.dumps(as_document(results, facts), indent=2))


def model_flops(method: str, section: Any, config: Any, shape: Shape, *, tokens: int, batch: int) -> float:
    """Operations of one step by the method's formula, all positions live; recomputation does not count.

    6 for each trained weight and row (forward, and backward for weights and inputs), 2 for a frozen weight without a
    backward pass, 4 for a frozen one that gradients pass through. Attention: the pairs that the mask leaves.
    """
    rows_a_sample = method_of(method).logit_rows(section, config, tokens)
    if method == "eagle3":
        return batch * _eagle3(shape, tokens, rows_a_sample, config.draft_vocab_size)
    return batch * _blocks(shape, tokens, section, config)


def _eagle3(shape: Shape, tokens: int, rows: int, vocabulary: int) -> float:
    hidden, width, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = 2 * hidden * (width + 2 * kv) + width * hidden + 3 * hidden * shape.mlp + vocabulary * hidden
    fused = 6 * tokens * 3 * hidden * hidden  # the three states of a token become one
    attention = 12 * rows * (tokens / 2) * width
    teacher = 2 * tokens * hidden * shape.vocab
    return teacher + fused + 6 * rows * layer + attention


def _blocks(shape: Shape, tokens: int, section: Any, config: Any) -> float:
    hidden, width, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layers, captured = config.num_hidden_layers, len(config.target_layer_ids)
    slots = min(section.anchors, tokens - 1) * config.block_size
    of_context = captured * hidden * hidden + layers * 2 * hidden * kv  # each token: its features, its keys and values
    of_slots = layers * (hidden * (width + 2 * kv) + width * hidden + 3 * hidden * shape.mlp)
    attention = 12 * slots * layers * (tokens / 2 + config.block_size) * width
    logits = 4 * slots * hidden * shape.vocab  # the target's head, frozen
    teacher = 2 * slots * hidden * shape.vocab
    return 6 * (tokens * of_context + slots * of_slots) + attention + logits + teacher
