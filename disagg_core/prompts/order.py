"""The seeded order of prompts: a permutation that is computed, not stored.

A run over a million prompts has to start at any place of the order without holding it. A Feistel network over the
smallest even number of bits that covers the count is a bijection whatever its round function; walking the cycle until
the value is below the count makes it a permutation of exactly that many (Black and Rogaway, "Ciphers with arbitrary
finite domains", 2002). It shuffles; it keeps no secrets.
"""

from __future__ import annotations

_ROUNDS = 4
_MASK64 = (1 << 64) - 1


def mix64(value: int) -> int:
    """Return a well mixed 64-bit number made of `value` (the finaliser of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def seed_of(*parts: int) -> int:
    """Return one 64-bit seed for a tuple of non-negative numbers, in which every part and its place count."""
    state = 0
    for part in parts:
        state = mix64(state ^ mix64(part))
    return state


class SeededPermutation:
    """A permutation of ``range(size)``, fixed by `seed`; constant memory, a few microseconds a value."""

    def __init__(self, size: int, seed: int) -> None:
        if size < 0:
            raise ValueError(f"expected a size of at least 0, found {size}")
        self.size = size
        self._half_bits = max(1, ((max(size - 1, 1)).bit_length() + 1) // 2)
        self._half_mask = (1 << self._half_bits) - 1
        self._keys = [mix64(seed_of(seed, round_)) for round_ in range(_ROUNDS)]

    def __getitem__(self, position: int) -> int:
        """Return what stands at `position` of the order."""
        if not 0 <= position < self.size:
            raise IndexError(f"expected a position from 0 to {self.size - 1}, found {position}")
        value = self._permute(position)
        while value >= self.size:
            value = self._permute(value)
        return value

    def _permute(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (mix64(right ^ key) & self._half_mask)
        return (left << self._half_bits) | right
