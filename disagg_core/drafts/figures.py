"""What a loss module says of a batch: sums that add over micro-batches and ranks, and the figures that come of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Figures: TypeAlias = dict[str, float | list[float]]
"""Figures of a step by name; lists have one entry for each drafted position."""


@dataclass(frozen=True)
class Ratio:
    """A figure before it is divided; both parts add over micro-batches and ranks. Shapes [n], or scalars."""

    numerator: Tensor
    denominator: Tensor

    def value(self) -> list[float]:
        """Return numerator / denominator, [n], zero where there was nothing to count."""
        quotient = self.numerator / self.denominator.clamp(min=torch.finfo(self.denominator.dtype).tiny)
        return [float(v) for v in quotient.flatten()]


@dataclass(frozen=True)
class LossOutput:
    """What the loss module says of a batch.

    `total` is the batch's part of the window's loss, a scalar already divided by the window's normalisers: the sum over
    all batches of a window is the loss, and only this tensor takes gradients. `ratios` are the figures; every batch of
    a method has the same names and shapes, also one that weighs nothing.
    """

    total: Tensor
    ratios: Mapping[str, Ratio]


def _flatten(output: LossOutput) -> tuple[list[Tensor], tuple[str, ...]]:
    parts = [part for ratio in output.ratios.values() for part in (ratio.numerator, ratio.denominator)]
    return [output.total, *parts], tuple(output.ratios)


def _unflatten(values: Iterable[Tensor], names: tuple[str, ...]) -> LossOutput:
    total, *parts = values
    ratios = (Ratio(*pair) for pair in zip(parts[::2], parts[1::2], strict=True))
    return LossOutput(total, dict(zip(names, ratios, strict=True)))


# FSDP finds the tensor to start its backward pass from by flattening a module's output.
pytree.register_pytree_node(LossOutput, _flatten, _unflatten, serialized_type_name="draftline.LossOutput")
