"""Which of a target's layers the drafts of the EAGLE family read: three, spread over the depth, never the last."""

from __future__ import annotations

import itertools

from disagg_core.errors import TargetError

COUNT = 3
"""Layers whose outputs are laid side by side as a draft's input."""


def default_layers(num_layers: int) -> tuple[int, int, int]:
    """Return the three decoder layers (0-based outputs) that are captured by default, ascending.

    ``[1, n//2 - 1, n - 4]`` for n layers; where these collide or go negative, three spread ids before the last layer,
    which is never captured because SGLang cannot.

    Raises:
        TargetError: the target has fewer than four layers.
    """
    chosen = (1, num_layers // 2 - 1, num_layers - 4)
    if 0 <= chosen[0] < chosen[1] < chosen[2]:
        return chosen
    if num_layers < 4:
        raise TargetError(
            f"expected a target of at least 4 decoder layers (three are captured, never the last), found {num_layers}"
        )
    last = num_layers - 2
    return (0, last // 2, last)


def check_layers(layers: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """Return `layers` if they are three that the target has.

    Raises:
        TargetError: not three ascending and distinct, out of range, or the last layer.
    """
    ascending = all(low < high for low, high in itertools.pairwise(layers))
    if len(layers) != COUNT or not ascending or layers[0] < 0 or layers[-1] > num_layers - 2:
        raise TargetError(
            f"target.aux_layers: expected three ascending layer ids from 0 to {num_layers - 2} "
            f"(the target has {num_layers} layers and the last cannot be captured), found {list(layers)}"
        )
    return layers
