"""Several decoders in turn over the same prompts, so that whatever the machine does meanwhile hits all of them alike.

Prompts are cut into small batches. All decoders continue a batch before the next one begins, and who goes first moves
on by one from batch to batch. Each continues one prompt beforehand, untimed: the first pass of a process is slow.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from disagg_core.evaluation.speculative import Decode, Generation, Progress

PLAIN = "plain"
"""What the target without a draft is called among decoders."""


@dataclass(frozen=True)
class Decoded:
    """What one decoder made of the prompts, in their order, and of each batch the seconds that it took."""

    generations: list[Generation]
    batches: list[tuple[int, ...]] = field(default_factory=list)  # numbers of prompts; the same for every decoder
    seconds: list[float] = field(default_factory=list)


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """Return `names` in the order in which they decode batch `number`."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def decode_in_turn(
    prompts: Sequence[Sequence[int]],
    decoders: Mapping[str, Decode],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> dict[str, Decoded]:
    """Continue `prompts`, at least one, with each of `decoders`, prompts of like length together; return it by name.

    `progress` is called with the number of finished prompts and of all, those of all decoders together.
    """
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    batches = [tuple(by_length[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    for decode in decoders.values():
        decode([prompts[by_length[0]]])
    found = {name: Decoded([Generation() for _ in prompts], batches) for name in decoders}
    done, total = 0, len(prompts) * len(decoders)
    for turn, batch in enumerate(batches):
        chosen = [prompts[number] for number in batch]
        for name in in_turn(list(decoders), turn):
            started = time.perf_counter()
            generations = decoders[name](chosen)
            found[name].seconds.append(time.perf_counter() - started)
            for number, generation in zip(batch, generations, strict=True):
                found[name].generations[number] = generation
            done += len(batch)
            if progress is not None:
                progress(done, total)
    return found
