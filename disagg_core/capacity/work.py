"""What one sample of a run takes, known from its plan: operations of capture and training, bytes, parameters."""

from __future__ import annotations

from dataclasses import dataclass

from disagg_core.contracts import DTYPE_BYTES
from disagg_core.drafts.warm_start import first_config
from disagg_core.run.plan import PlannedDraft, RunPlan
from disagg_core.target.weights import parameters

_FORWARD, _TRAINED = 2, 6
"""Operations for each weight and row: of a forward pass, and of one with its backward pass."""


@dataclass(frozen=True)
class SampleWork:
    """What a sample of `tokens` tokens takes, `new_tokens` of them generated. Operations are floating-point ones.

    `weight_bytes` are those of the target, `trained` the parameters of all drafts. `batch` samples make up a step of
    one rank, or of a group of ranks that share them; `decoded_together` are continuations that a server decodes at a
    time.
    """

    tokens: float
    new_tokens: float
    sample_bytes: float
    prefill_flops: float
    training_flops: float
    weight_bytes: float
    trained: int
    batch: int
    decoded_together: int


def work_of(plan: RunPlan, tokens: float | None = None) -> SampleWork:
    """Return the work of a sample of `tokens` tokens; by default of half the longest one.

    A prefill runs every weight but those of embedding and head on every token, and attention over the tokens before.
    A training step runs the draft's weights on each row that its loss makes logits for, forward and backward, and the
    target's head once on every token; attention and recomputation of the draft are left out.
    """
    spec, facts = plan.spec, plan.target
    mean = tokens if tokens is not None else spec.data.max_tokens / 2
    weights = parameters(spec.target)
    head = facts.vocab_size * facts.hidden_size
    body = weights - head * (1 if facts.tie_word_embeddings else 2)
    attention = facts.num_layers * facts.num_attention_heads * facts.head_dim * mean  # causal half of 4 x T a token
    generate = spec.data.generate
    return SampleWork(
        tokens=mean,
        new_tokens=min(generate.max_new_tokens, mean / 2) if generate is not None else 0.0,
        sample_bytes=mean * plan.bytes_per_token,
        prefill_flops=_FORWARD * mean * (body + attention),
        training_flops=sum(_training_flops(draft, mean) for draft in plan.drafts),
        weight_bytes=weights * DTYPE_BYTES[facts.dtype],
        trained=sum(_parameters(draft) for draft in plan.drafts),
        batch=spec.training.batch_size * spec.training.accumulation_steps,
        decoded_together=spec.target.server_concurrency,
    )


def _training_flops(draft: PlannedDraft, tokens: float) -> float:
    target = draft.target
    config = first_config(draft.init_path, draft.section, target, draft.capture, draft.vocabulary.size)
    rows = draft.method.logit_rows(draft.section, config, round(tokens))
    teacher = _FORWARD * tokens * target.hidden_size * target.vocab_size if draft.capture.last_hidden_state else 0.0
    return _TRAINED * rows * draft.method.parameters(config) + teacher


def _parameters(draft: PlannedDraft) -> int:
    size = draft.vocabulary.size
    return draft.method.parameters(first_config(draft.init_path, draft.section, draft.target, draft.capture, size))
