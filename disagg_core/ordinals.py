"""A compact set of prompt ordinals: the data cursor of a checkpoint.

Samples are trained in published order, so the set of what was trained is a handful of ranges however long the run.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator


class OrdinalSet:
    """A set of non-negative integers held as sorted, disjoint, closed ranges."""

    def __init__(self, ranges: Iterable[tuple[int, int] | list[int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self._count = 0
        for first, last in ranges:
            if not (isinstance(first, int) and isinstance(last, int) and 0 <= first <= last):
                raise ValueError(f"expected ranges of ordinals with 0 <= first <= last, found [{first}, {last}]")
            self._add_range(first, last)

    def add(self, ordinal: int) -> bool:
        """Add one ordinal; return False if it was there already."""
        if ordinal in self:
            return False
        self._add_range(ordinal, ordinal)
        return True

    def _add_range(self, first: int, last: int) -> None:
        low = bisect.bisect_left(self._stops, first - 1)
        high = bisect.bisect_right(self._starts, last + 1)
        if low < high:
            first = min(first, self._starts[low])
            last = max(last, self._stops[high - 1])
            self._count -= sum(b - a + 1 for a, b in zip(self._starts[low:high], self._stops[low:high], strict=True))
        self._starts[low:high] = [first]
        self._stops[low:high] = [last]
        self._count += last - first + 1

    def __contains__(self, ordinal: object) -> bool:
        if not isinstance(ordinal, int):
            return False
        position = bisect.bisect_right(self._starts, ordinal) - 1
        return position >= 0 and ordinal <= self._stops[position]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        for first, last in self.ranges():
            yield from range(first, last + 1)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OrdinalSet) and self.ranges() == other.ranges()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def ranges(self) -> list[tuple[int, int]]:
        """Return the closed ranges, ascending: what is written into a checkpoint."""
        return list(zip(self._starts, self._stops, strict=True))
