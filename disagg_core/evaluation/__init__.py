"""Real speculative decoding with a draft, and the accept length it reaches."""

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
