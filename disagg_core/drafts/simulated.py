"""What accuracies by position promise of decoding."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def simulated_accept_length(accuracies: Sequence[float] | Tensor) -> float:
    """Return ``1 + sum_k prod_{i <= k} acc_i``: tokens per target pass if steps were right independently."""
    length, product = 1.0, 1.0
    for accuracy in accuracies:
        product *= float(accuracy)
        length += product
    return length
