"""The state of torch's generators that belongs to one draft: others that are trained beside it draw nothing from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class RandomState:
    """A draft's own state of torch's global generators, on the CPU and on the rank's GPU."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self._states = {"cpu": torch.Generator().manual_seed(seed).get_state()}
        if device.type == "cuda":
            self._states["cuda"] = torch.Generator(device).manual_seed(seed).get_state()

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Have torch's generators go on from this state inside."""
        self._put()
        try:
            yield
        finally:
            self._states["cpu"] = torch.get_rng_state()
            if self._device.type == "cuda":
                self._states["cuda"] = torch.cuda.get_rng_state(self._device)

    def tensors(self) -> dict[str, Tensor]:
        """Return the states, as a checkpoint keeps them."""
        return dict(self._states)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the states that `tensors` returned."""
        self._states = {name: tensors[name] for name in self._states}

    def _put(self) -> None:
        torch.set_rng_state(self._states["cpu"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._states["cuda"], self._device)
