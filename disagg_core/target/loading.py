"""The one way to load a target: on the CPU, on one GPU, or spread over several that together can hold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from disagg_core.errors import MissingLibrary, TargetError
from disagg_core.run_spec.document import TargetSection
from disagg_core.run_spec.section import is_local
from disagg_core.target.facts import TargetFacts, model_class
from disagg_core.target.weights import weight_bytes

_USABLE_MEMORY = 0.8
"""Part of a GPU's free memory that weights may take; the rest is for activations."""


def load_target(
    section: TargetSection, facts: TargetFacts, *, dtype: torch.dtype | None = None, num_layers: int | None = None
) -> nn.Module:
    """Return the target with its causal head, frozen and in eval mode, on the device that `section` asks for.

    Args:
        section: the model, its revision and where to put it; `auto` is a GPU where there is one.
        facts: its sizes, by which is decided whether one GPU can hold it.
        dtype: by default the target's own.
        num_layers: load only the first so many decoder layers, to look at a model that this machine cannot hold.

    Raises:
        TargetError: the weights cannot be read, or there is no such device.
        MissingLibrary: the target has to be spread over several GPUs, and accelerate is not installed.
    """
    from transformers import AutoConfig

    source = str(Path(section.model).expanduser()) if is_local(section.model) else section.model
    dtype = dtype or getattr(torch, facts.dtype)
    placement = _placement(section, facts, dtype)
    options = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if num_layers is not None:
            config.get_text_config().num_hidden_layers = num_layers
        device_map = {"device_map": "auto"} if placement == "spread" else {}
        model = model_class(config).from_pretrained(source, config=config, dtype=dtype, **options, **device_map)
    except (OSError, ValueError) as error:
        raise TargetError(f"target.model: cannot load {section.model!r}: {str(error).splitlines()[0]}") from error
    placed: nn.Module = model if placement == "spread" else model.to(placement)
    _let_the_head_take_slices(model)
    return placed.eval().requires_grad_(False)


def _let_the_head_take_slices(model: Any) -> None:
    """Have the head copy its input where that has gaps: the last position of each row of a batch of prompts.

    torch multiplies such a slice with a frozen weight row by row, each with a copy of the weight: 3.6 GB for 64 rows
    and a head of 49,152 x 576 in bf16.
    """
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, arguments: (arguments[0].contiguous(), *arguments[1:]))


def _placement(section: TargetSection, facts: TargetFacts, dtype: torch.dtype) -> str:
    """Return ``cpu``, ``cuda``, or ``spread`` for a model that one GPU cannot hold."""
    available = torch.cuda.is_available()
    if section.device == "cuda" and not available:
        raise TargetError("target.device: expected a CUDA device, found none; use cpu or auto")
    if section.device == "cpu" or not available:
        return "cpu"
    free, _ = torch.cuda.mem_get_info()
    if weight_bytes(section, dtype) <= free * _USABLE_MEMORY:
        return "cuda"
    try:
        import accelerate  # type: ignore[import-not-found] # noqa: F401
    except ImportError as error:
        raise MissingLibrary(
            f"target {facts.model} does not fit one GPU ({free >> 30} GiB free); to spread it over "
            f"{torch.cuda.device_count()}: pip install accelerate"
        ) from error
    return "spread"
