"""Rotary position embeddings of a draft: default, linear, dynamic, llama3 and yarn.

The formulas are those of Hugging Face's `modeling_rope_utils`, so that a draft computes in training what a server
computes from the same config.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor


class RopeSizes(Protocol):
    """The part of a draft's config that its rotary embedding needs."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""

    @property
    def max_position_embeddings(self) -> int:
        """Longest position that the RoPE was made for."""

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """As `disagg_core.drafts.rope_parameters.complete_rope_parameters` returns them."""


class RotaryEmbedding:
    """Cosines and sines of positions; holds no parameters.

    `dynamic` (NTK) depends on the sequence length: beyond `max_position_embeddings` the base grows with it.
    """

    def __init__(self, config: RopeSizes) -> None:
        self._config = config
        self._tables: dict[tuple[torch.device, int], tuple[Tensor, float]] = {}

    def __call__(self, positions: Tensor, seq_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each ``[*positions.shape, head_dim]`` of `dtype`.

        Args:
            positions: integer positions of any shape.
            seq_len: length of the sequence that is processed, highest position + 1; matters to `dynamic` only.
            dtype: of the result; computed in fp32 (fp64 when `dtype` is fp64).
        """
        inv_freq, scaling = self._table(positions.device, seq_len)
        work = torch.float64 if dtype == torch.float64 else torch.float32
        angles = positions.to(work).unsqueeze(-1) * inv_freq.to(work)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)

    def _table(self, device: torch.device, seq_len: int) -> tuple[Tensor, float]:
        dynamic = self._config.rope_parameters["rope_type"] == "dynamic"
        length = max(seq_len, self._config.max_position_embeddings) if dynamic else 0
        key = (device, length)
        if key not in self._tables:
            frequencies, scaling = inverse_frequencies(self._config, seq_len)
            self._tables[key] = (frequencies.to(device), scaling)
        return self._tables[key]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE in the half-split convention of Llama.

    Args:
        x: ``[..., heads, head_dim]``.
        cos: ``[..., head_dim]``, as from `RotaryEmbedding`, broadcast over the heads.
        sin: likewise.
    """
    low, high = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(-2) + torch.cat((-high, low), dim=-1) * sin.unsqueeze(-2)


def inverse_frequencies(config: RopeSizes, seq_len: int) -> tuple[Tensor, float]:
    """Return the inverse frequencies ``[head_dim / 2]`` (fp32) and the factor on cosines and sines.

    Args:
        config: with `rope_parameters`.
        seq_len: for `dynamic`; lengths up to `max_position_embeddings` leave the frequencies as they are.
    """
    rope = config.rope_parameters
    dim, base = config.head_dim, float(rope["rope_theta"])
    if rope["rope_type"] == "dynamic":
        limit, factor = config.max_position_embeddings, rope["factor"]
        stretch = factor * max(seq_len, limit) / limit - (factor - 1)
        base = base * stretch ** (dim / (dim - 2))
    inv_freq = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim))
    if rope["rope_type"] == "linear":
        return inv_freq / rope["factor"], 1.0
    if rope["rope_type"] == "llama3":
        return _llama3(inv_freq, rope), 1.0
    if rope["rope_type"] == "yarn":
        return _yarn(config, base)
    return inv_freq, 1.0


def _llama3(inv_freq: Tensor, rope: dict[str, Any]) -> Tensor:
    """Divide low frequencies by the factor, keep high ones, interpolate between (Llama 3.1)."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    smooth = (original / wavelength - low) / (high - low)
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    medium = ~(wavelength < original / high) & ~(wavelength > original / low)
    return torch.where(medium, smoothed, scaled)


def _yarn(config: RopeSizes, base: float) -> tuple[Tensor, float]:
    """Interpolate low frequencies, keep high ones, ramp between (https://arxiv.org/abs/2309.00071)."""
    rope, dim = config.rope_parameters, config.head_dim
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config.max_position_embeddings / original

    def magnitude(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    def dimension(rotations: float) -> float:
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(base))

    scaling = rope.get("attention_factor")
    if scaling is None:
        mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
        if mscale and mscale_all:
            scaling = magnitude(factor, mscale) / magnitude(factor, mscale_all)
        else:
            scaling = magnitude(factor)

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    keep = 1 - ramp
    frequencies = base ** (torch.arange(0, dim, 2).to(torch.float32) / dim)
    return (1.0 / (factor * frequencies)) * (1 - keep) + (1.0 / frequencies) * keep, float(scaling)
