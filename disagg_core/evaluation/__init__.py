"""Real speculative decoding with a draft, and the accept length it reaches.

Names are loaded when they are first used: who reads a suite of prompts needs no decoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from disagg_core import lazy_names

if TYPE_CHECKING:
    from disagg_core.evaluation.accept_length import AcceptLength, Divergence, measure_accept_length
    from disagg_core.evaluation.speculative import Generation, generate_all, speculative_generate

__all__ = [
    "AcceptLength",
    "Divergence",
    "Generation",
    "generate_all",
    "measure_accept_length",
    "speculative_generate",
]

__getattr__ = lazy_names(
    __name__,
    {
        "AcceptLength": "evaluation.accept_length",
        "Divergence": "evaluation.accept_length",
        "Generation": "evaluation.speculative",
        "generate_all": "evaluation.speculative",
        "measure_accept_length": "evaluation.accept_length",
        "speculative_generate": "evaluation.speculative",
    },
)
