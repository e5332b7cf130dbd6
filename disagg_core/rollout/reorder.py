"""The reorder buffer: finished references leave in prompt order, however captures complete.

Bounded by its caller: nothing is expected that was not admitted under the watermarks, so it never holds more than
what may be in flight. Holds references only; their tensors are in the store.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")
"""What is put in order: a finished reference."""


class ReorderBuffer(Generic[Item]):
    """Releases references in the order in which their ordinals were expected, or as they come (`ordered` False)."""

    def __init__(self, *, ordered: bool) -> None:
        self._ordered = ordered
        self._expected: deque[int] = deque()
        self._pending: set[int] = set()
        self._dropped: set[int] = set()
        self._ready: dict[int, Item] = {}

    def expect(self, ordinal: int) -> None:
        """Reserve the next place for `ordinal`; once for each ordinal, ascending."""
        assert ordinal not in self._pending, f"ordinal {ordinal} is expected already"
        self._pending.add(ordinal)
        if self._ordered:
            self._expected.append(ordinal)

    def put(self, ordinal: int, ref: Item) -> None:
        """Hand in the finished reference of an expected ordinal."""
        assert ordinal in self._pending, f"ordinal {ordinal} is not expected"
        self._ready[ordinal] = ref

    def drop(self, ordinal: int) -> None:
        """Give up the place of an expected ordinal: it was rejected."""
        self._pending.remove(ordinal)
        if self._ordered:
            self._dropped.add(ordinal)

    def pop_ready(self, limit: int) -> list[Item]:
        """Return up to `limit` references whose turn it is."""
        if not self._ordered:
            chosen = list(self._ready)[:limit]
            self._pending.difference_update(chosen)
            return [self._ready.pop(ordinal) for ordinal in chosen]
        refs: list[Item] = []
        while self._expected and len(refs) < limit:
            head = self._expected[0]
            if head in self._dropped:
                self._dropped.remove(head)
            elif head in self._ready:
                refs.append(self._ready.pop(head))
                self._pending.remove(head)
            else:
                break
            self._expected.popleft()
        return refs

    @property
    def has_ready(self) -> bool:
        """Whether `pop_ready` would release something."""
        if not self._ordered:
            return bool(self._ready)
        return next((o for o in self._expected if o not in self._dropped), None) in self._ready

    def drain(self) -> list[Item]:
        """Return and forget every reference that was never released: their samples have to be freed."""
        refs = list(self._ready.values())
        self._ready.clear()
        self._pending.clear()
        self._expected.clear()
        self._dropped.clear()
        return refs

    def __len__(self) -> int:
        return len(self._pending)
