"""What the drafts of one run need together: they are trained on the same samples of one rollout.

Each draft then takes its own part of a sample, and computes what it would compute alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from disagg_core.contracts import Capture
from disagg_core.drafts.registry import method_of
from disagg_core.run_spec.document import TargetSection
from disagg_core.run_spec.draft import DraftSection
from disagg_core.target.facts import TargetFacts


def capture_for(section: DraftSection, target: TargetSection, facts: TargetFacts) -> Capture:
    """Return what the draft of `section` reads of the `target` with these `facts`.

    Raises:
        TargetError: the target lacks the layers, or the document's choice does not fit the method.
    """
    layers = section.aux_layers if section.aux_layers is not None else target.aux_layers
    return method_of(section.method).capture(section, facts.num_layers, layers)


def capture_of(sections: Sequence[DraftSection], target: TargetSection, facts: TargetFacts) -> Capture:
    """Return what is captured for the drafts of all `sections`: each layer that one of them reads, once.

    Raises:
        TargetError: as `capture_for`.
    """
    own = [capture_for(section, target, facts) for section in sections]
    layers = sorted({layer for capture in own for layer in capture.layers})
    return Capture(tuple(layers), last_hidden_state=any(capture.last_hidden_state for capture in own))


def strategy_of(sections: Sequence[DraftSection]) -> str:
    """Return what a run's samples are for: its drafts' methods, with the names of those that have another name."""
    return "+".join(
        section.method if section.label == section.method else f"{section.label}:{section.method}"
        for section in sections
    )


def untrainable(sections: Sequence[DraftSection], loss_mask: Sequence[int]) -> str | None:
    """Return why a sample with this `loss_mask` is not trained on, or None if it is.

    What one draft can learn nothing from is kept from all: they are compared at equal samples.
    """
    for section in sections:
        reason = method_of(section.method).untrainable(loss_mask)
        if reason is not None:
            return reason if len(sections) == 1 else f"{section.label}: {reason}"
    return None
