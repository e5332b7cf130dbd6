"""The machines that a forecast is made for: peaks as their makers state them, and the part that work reaches."""

from __future__ import annotations

from pydantic import Field

from disagg_core.errors import BadInput
from disagg_core.run_spec.section import Section


class Hardware(Section):
    """One kind of GPU, its node and its network. Rates are bytes or operations a second, in one direction."""

    gpu: str = Field(description="What the GPU is called.")
    tflops: float = Field(gt=0, description="Dense bf16 peak of one GPU, in 10^12 operations a second.")
    memory_gbs: float = Field(gt=0, description="Memory bandwidth of one GPU, in GB/s.")
    link_gbs: float = Field(gt=0, description="Bandwidth between the GPUs of one node, in GB/s of each GPU.")
    gpus_per_node: int = Field(8, ge=1, description="GPUs of one node.")
    network_gbs: float = Field(50.0, gt=0, description="Network of one node, in GB/s: 50 is 400 Gbit/s.")
    owner_gbs: float = Field(
        2.0, gt=0, description="What one store owner takes in or gives out over its transport, in GB/s; tcp: about 2."
    )
    capture_mfu: float = Field(0.44, gt=0, le=1, description="Part of the peak that a prefill reaches.")
    training_mfu: float = Field(0.44, gt=0, le=1, description="Part of the peak that a training step reaches.")
    decode_efficiency: float = Field(0.6, gt=0, le=1, description="Part of the memory bandwidth that decoding reaches.")
    price: float | None = Field(None, gt=0, description="Price of one GPU for an hour, in any currency.")


_PRESETS = {
    "a100": {"tflops": 312.0, "memory_gbs": 2039.0, "link_gbs": 300.0},
    "h100": {"tflops": 989.0, "memory_gbs": 3350.0, "link_gbs": 450.0},
    "h200": {"tflops": 989.0, "memory_gbs": 4800.0, "link_gbs": 450.0},
    "b200": {"tflops": 2250.0, "memory_gbs": 8000.0, "link_gbs": 900.0},
}
"""Data-sheet figures of the SXM cards; the MFU of both sides is the one that SpecForge published for 8 H200."""


def hardware_of(gpu: str, **changes: float | int | None) -> Hardware:
    """Return a node of `gpu` with `changes`; None leaves a default.

    Raises:
        BadInput: there is no such preset.
    """
    preset = _PRESETS.get(gpu.lower())
    if preset is None:
        raise BadInput(f"--gpu: expected one of {', '.join(_PRESETS)}, found {gpu}")
    given = {name: value for name, value in changes.items() if value is not None}
    return Hardware.model_validate({"gpu": gpu.lower(), **preset, **given})
