"""The logits of a loaded target, compared with what its last state and its config say of them."""

from __future__ import annotations

from typing import Any

import torch

from disagg_core.contracts import Capture
from disagg_core.errors import TargetError
from disagg_core.target.layers import LayerStates
from disagg_core.target.parts import capped, parts_of
from disagg_core.target.text_model import logit_cap, logit_scale

_LOGIT_TOLERANCE = 0.05
"""Share of the largest logit by which logits may differ: half precision rounds within a hundredth."""


def check_logits(model: Any) -> None:
    """Check that the logits of a loaded transformers `model` follow from its last state as a teacher's do.

    A family may do with its logits what no field of its config says. Nothing but this would tell before the drafts'
    accept length does.

    Raises:
        TargetError: they do not.
    """
    embedding, head = parts_of(model)
    if not head.is_floating_point() or head.dtype.itemsize == 1:
        return  # quantised: its product is the module's own
    ids = torch.arange(1, 5, device=embedding.device)[None] % len(embedding)
    states = LayerStates(model, Capture((), last_hidden_state=True))
    text = model.config.get_text_config()
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits.float()
        last = states.last
        assert last is not None
        expected = capped(last.to(head.device).float() @ head.float().T, logit_cap(text)).to(found.device)
    states.close()
    width = min(found.shape[-1], expected.shape[-1])
    off = (found - expected)[..., :width].abs().max() / found.abs().max().clamp(min=1e-6)
    if off > _LOGIT_TOLERANCE:
        raise TargetError(
            f"{type(model).__name__}: expected logits of its last state times its LM head, with the factor "
            f"{logit_scale(model.config):g} and the bound {logit_cap(text)} that its config says, found others (off by "
            f"{float(off):.0%}): drafts would be taught another distribution than the target's"
        )
