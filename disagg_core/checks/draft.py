"""Whether the draft that a run begins with, fresh or published, suits the run's samples and its evaluation."""

from __future__ import annotations

from collections.abc import Set

from disagg_core.drafts.method import DraftConfig, DraftMethod
from disagg_core.errors import BadInput
from disagg_core.run_spec.document import RunSpec


def check_draft(method: DraftMethod, config: DraftConfig, spec: RunSpec, tokens: Set[int]) -> None:
    """Check one draft of `config`; `tokens` are ids that occur in the run's prompts, as far as they were looked at.

    Raises:
        BadInput: the draft's mask token occurs in prompts, or the draft proposes more at once than a sample has, or
            fewer than the evaluation asks for; each fault is named.
    """
    faults = []
    mask = method.mask_token(config)
    if mask in tokens:
        faults.append(
            f"draft.mask_token_id: expected a token that never occurs in a sample, found {mask}, which occurs in "
            "data.prompts; take an embedding row that the tokenizer does not use, or a reserved special token"
        )
    most = method.most_draft_tokens(config)
    if most is not None and most >= spec.data.max_tokens:
        faults.append(
            f"data.max_tokens: expected more than the {most} tokens that this {method.title} draft proposes at once, "
            f"found {spec.data.max_tokens}"
        )
    if most is not None and spec.evaluation.measured and spec.evaluation.draft_tokens > most:
        faults.append(
            f"evaluation.draft_tokens: expected at most the {most} tokens that this {method.title} draft proposes at "
            f"once, found {spec.evaluation.draft_tokens}"
        )
    if faults:
        raise BadInput("; ".join(faults))
