"""Which of a draft's parameters are matrices inside it, as optimizers for matrices take them."""

from __future__ import annotations

from torch import nn

from disagg_core.drafts.method import DraftModel


def hidden_matrices(draft: DraftModel) -> set[nn.Parameter]:
    """Return the trained weights of linear layers inside `draft`, each ``[out, in]``.

    A head, whose rows are the tokens of a vocabulary, an embedding or a codebook is none of them, nor is a layer that
    gives a single number.
    """
    tokens = {draft.config.vocab_size, draft.config.draft_vocab_size}
    layers = (module for module in draft.modules() if isinstance(module, nn.Linear))
    inside = {id(layer.weight) for layer in layers if layer.out_features > 1 and layer.out_features not in tokens}
    return {parameter for parameter in draft.parameters() if parameter.requires_grad and id(parameter) in inside}
