"""What is random in a training step, as a function of the run's seed and the sample."""

from __future__ import annotations

import hashlib

import torch


def generator_of(seed: int, sample_id: str, purpose: str) -> torch.Generator:
    """Return a generator on the CPU for what is drawn for a sample; each `purpose` has a stream of its own."""
    digest = hashlib.sha256(f"{seed}/{sample_id}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
