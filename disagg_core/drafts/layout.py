"""Where the samples of a batch lie in its tensors: each padded to a row of its own, or all in one row (packed).

Packed, nothing is padded: the states of n samples take as many tokens as the samples have. Samples stay apart because
every index, position, anchor and attention bound of a step is made sample by sample; no mask of all tokens by all
tokens is needed, and a step computes the same rows whichever way its batch is laid out. Masks, a byte for each token,
stay padded and in host memory, where a step is planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from disagg_core.host_memory import host_memory


@dataclass(frozen=True)
class Layout:
    """Position t of sample s has the index ``starts[s] + t`` in tensors that are flattened over rows and tokens."""

    starts: Tensor  # [batch] int64
    limits: Tensor  # [batch] int64, tokens that sample s has there, padding included
    width: int  # tokens of a row of the padded tensors
    packed: bool
    pin: bool = False  # whether `laid` makes its tensors in pinned memory

    @classmethod
    def padded(cls, batch: int, width: int, device: torch.device | str = "cpu") -> Layout:
        """Return the layout of `batch` samples in rows of `width` tokens."""
        starts = torch.arange(batch, device=device) * width
        return cls(starts, torch.full_like(starts, width), width, packed=False)

    @classmethod
    def like(cls, mask: Tensor) -> Layout:
        """Return the layout of samples that are padded as `mask` ``[batch, tokens]`` is, on its device."""
        batch, width = mask.shape
        return cls.padded(batch, width, mask.device)

    @classmethod
    def of(cls, lengths: Sequence[int], *, multiple_of: int, packed: bool, pin: bool = False) -> Layout:
        """Return the layout of samples of `lengths` tokens; rows are padded to a multiple of `multiple_of` tokens."""
        width = _rounded(max(lengths), multiple_of)
        if not packed:
            return replace(cls.padded(len(lengths), width), pin=pin)
        limits = torch.tensor(lengths)
        return cls(limits.cumsum(0) - limits, limits, width, packed=True, pin=pin)

    def grid(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the samples' `rows` ``[t, ...]`` padded with zeros on the right, ``[batch, width, ...]``."""
        grid = rows[0].new_zeros(len(rows), self.width, *rows[0].shape[1:])
        for place, row in zip(grid, rows, strict=True):
            place[: len(row)] = row
        return grid

    def laid(self, rows: Sequence[Tensor], *, multiple_of: int = 1, dtype: torch.dtype | None = None) -> Tensor:
        """Return the samples' `rows` ``[t, ...]`` as ``[batch, width, ...]``, or in one row as ``[1, tokens, ...]``.

        A row may be shorter than its sample; zeros follow it. A packed row is padded to a multiple of `multiple_of`.
        A single row that fills the batch as it is is not copied: both share its memory.
        """
        tokens = _rounded(int(self.limits.sum()), multiple_of) if self.packed else len(rows) * self.width
        shape = (1 if self.packed else len(rows), -1, *rows[0].shape[1:])
        if len(rows[0]) == tokens and dtype in (None, rows[0].dtype) and not self.pin:
            return rows[0].reshape(shape)
        flat = self._empty((tokens, *shape[2:]), dtype or rows[0].dtype)
        ends = [*self.starts[1:].tolist(), tokens]
        for start, end, row in zip(self.starts.tolist(), ends, rows, strict=True):
            flat[start : start + len(row)] = row
            flat[start + len(row) : end] = 0
        return flat.view(shape)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        if self.pin:
            return torch.empty(*shape, dtype=dtype, pin_memory=True)  # torch uses such memory again by itself
        return host_memory.empty(shape, dtype)

    def inside(self, samples: Tensor, positions: Tensor) -> Tensor:
        """Return the flat indices of `positions`, of the `samples` named; those beyond the end become the last one."""
        return self.starts[samples] + torch.minimum(positions, self.limits[samples] - 1)


def _rounded(tokens: int, multiple_of: int) -> int:
    return -(-tokens // multiple_of) * multiple_of


def varied(lengths: Sequence[int]) -> bool:
    """Tell whether padding samples of these lengths would add to them."""
    return len(set(lengths)) > 1
