"""Drafts to publish, made of a few bytes, and a process that does so and is killed on the way."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from disagg_core.registry.registry import Registry
from disagg_core.registry.versions import Provenance
from disagg_core.storage.place import Place, open_place

TARGET = "tiny-target"


def registry_at(url: str) -> Registry:
    return Registry(open_place(url), TARGET)


def provenance(run_id: str, **changed: Any) -> Provenance:
    return Provenance(
        **{
            "run_id": run_id,
            "method": "eagle3",
            "target": "./tiny-target",
            "target_version": "t1",
            "tokenizer_version": "k1",
            "vocab_map_version": "m1",
            "draft_vocab_size": 32,
            "layers": (1, 2, 3),
            "formats": ("sglang",),
            "created": 1.0,
            **changed,
        }
    )


def make_draft(where: Path, seed: int = 0, size: int = 1000) -> dict[str, Path]:
    """The parts of a version, with `size` bytes of weights."""
    for part, weights in (("checkpoint", "draft.safetensors"), ("export/sglang", "model.safetensors")):
        (where / part).mkdir(parents=True, exist_ok=True)
        (where / part / "config.json").write_text('{"architectures": ["Draft"]}')
        (where / part / weights).write_bytes(bytes((seed + index) % 251 for index in range(size)))
    (where / "report.json").write_text("{}")
    return {
        "checkpoint": where / "checkpoint",
        "export/sglang": where / "export" / "sglang",
        "report/report.json": where / "report.json",
    }


class DyingPlace(Place):
    """A place whose process is killed when it has done so many steps: each request, and each block of a file."""

    def __init__(self, inner: Place, steps: list[int]) -> None:
        super().__init__(inner.url)
        self.inner = inner
        self.steps = steps

    def step(self) -> None:
        self.steps[0] -= 1
        if self.steps[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(self, blocks: Iterable[bytes]) -> Iterator[bytes]:
        for block in blocks:
            middle = len(block) // 2
            yield block[:middle]
            self.step()
            yield block[middle:]

    def blocks(self, name: str) -> Iterator[bytes]:
        self.step()
        return self.inner.blocks(name)

    def write(self, name: str, blocks: Iterable[bytes]) -> None:
        self.step()
        self.inner.write(name, self.counted(blocks))
        self.step()

    def create(self, name: str, data: bytes) -> bool:
        self.step()
        made = self.inner.create(name, data)
        self.step()
        return made

    def size(self, name: str) -> int | None:
        return self.inner.size(name)

    def names(self) -> list[str]:
        return self.inner.names()

    def children(self) -> list[str]:
        return self.inner.children()

    def remove(self, name: str) -> None:
        self.step()
        self.inner.remove(name)

    def clear(self) -> None:
        self.inner.clear()

    def sweep(self) -> None:
        self.inner.sweep()

    def at(self, name: str) -> DyingPlace:
        return DyingPlace(self.inner.at(name), self.steps)


def upload(url: str, draft: Path, run_id: str, die_at: int = 10**9) -> int:
    """Publish `draft` and return how many steps there were; at step `die_at` this process is killed."""
    steps = [die_at]
    registry = Registry(DyingPlace(open_place(url), steps), TARGET)
    registry.publish(make_draft(draft), provenance(run_id))
    return die_at - steps[0]


if __name__ == "__main__":
    upload(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
