"""Accept length: how many tokens a pass of the target yields with a draft, and whether the output stayed the target's.

Lossless means: token for token what plain greedy decoding gives. Both run through the same code and cache, but a pass
over k + 1 tokens sums in another order than a pass over one, so logits differ in their last bits. Where plain decoding
chose between two logits that are closer than this noise, either choice is its own; such a divergence is counted as a
tie, with its margin, and does not make the draft lossy. In fp32 the bound is 1e-5 of the largest logit and ties are
rare; in bf16, where logits have 8 bits, they are not.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from disagg_core.drafts.method import DraftModel
from disagg_core.errors import BadInput, EvaluationFailed
from disagg_core.evaluation.speculative import Decode, Generation, Progress, generate_all
from disagg_core.evaluation.turns import PLAIN, Decoded, decode_in_turn

logger = logging.getLogger(__name__)

_TIE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Logits closer than this part of the largest one count as equal."""
_DRAFT = "draft"


@dataclass(frozen=True)
class Divergence:
    """Where speculative and plain greedy decoding of a prompt part; `margin` is the plain token's lead in logits."""

    prompt: int
    position: int
    plain: int
    speculative: int
    margin: float
    tie: bool


@dataclass(frozen=True)
class AcceptLength:
    """The result of a measurement.

    ``accept_length == tokens / target_passes == 1 + sum(per_position)``. `tokens` counts what the passes yielded (not
    the token that the pass over a prompt gives, and without cutting the last pass where the text ends).
    `per_position[i]` is the part of the passes in which drafted token i + 1 was kept. `by_prompt` has tokens and passes
    of each prompt, in order; `interval` is the 95 % bootstrap interval of the accept length over prompts. `lossless` is
    None when plain decoding was not compared.
    """

    accept_length: float
    per_position: list[float]
    interval: tuple[float, float]
    lossless: bool | None
    prompts: int
    tokens: int
    target_passes: int
    draft_tokens: int
    seconds: float
    plain_seconds: float | None
    divergences: list[Divergence]
    by_prompt: list[tuple[int, int]]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain JSON values."""
        return {**asdict(self), "interval": list(self.interval), "by_prompt": [list(pair) for pair in self.by_prompt]}


def measure_accept_length(
    target: nn.Module,
    draft: DraftModel,
    prompts: Sequence[Sequence[int]],
    *,
    draft_tokens: int = 5,
    max_new_tokens: int = 64,
    eos_token_ids: Collection[int] = (),
    batch_size: int = 16,
    compare_with_plain: bool = True,
    progress: Progress | None = None,
) -> AcceptLength:
    """Decode `prompts` greedily with `draft` and, to compare, without, batch by batch; `target` is in eval mode.

    `progress` is called with the number of finished prompts and of all, twice as many when they are decoded without the
    draft too.

    Raises:
        BadInput: no prompts, an empty one, fewer than 2 new tokens (the first needs no pass of its own), or more draft
            tokens than the draft can propose at once.
        EvaluationFailed: every prompt ended with its first token, so there was nothing to measure.
        TargetError: see `TargetRunner`.
    """
    check_measurable(prompts, max_new_tokens)
    decoder = partial(
        generate_all, target, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids, batch_size=batch_size
    )
    decoders: dict[str, Decode] = {_DRAFT: partial(decoder, draft, draft_tokens=draft_tokens)}
    if compare_with_plain:
        decoders[PLAIN] = partial(decoder, None)
    decoded = decode_in_turn(prompts, decoders, batch_size=batch_size, progress=progress)
    return accept_length_of(target, prompts, decoded[_DRAFT], decoded.get(PLAIN), draft_tokens=draft_tokens)


def check_measurable(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Check that there is something to decode, and passes to count.

    Raises:
        BadInput: no prompts, or fewer than 2 new tokens.
    """
    if not prompts or max_new_tokens < 2:
        raise BadInput(
            "evaluation: expected at least one prompt and max_new_tokens of at least 2, "
            f"found {len(prompts)} prompts and {max_new_tokens}"
        )


def accept_length_of(
    target: nn.Module,
    prompts: Sequence[Sequence[int]],
    drafted: Decoded,
    plain: Decoded | None,
    *,
    draft_tokens: int,
) -> AcceptLength:
    """Return what was measured with a draft, and whether its output is that of `plain` decoding, where there is some.

    Raises:
        EvaluationFailed: there was no pass to measure, or one of the two stopped early.
    """
    divergences: list[Divergence] = []
    if plain is not None:
        divergences = _divergences(target, prompts, plain.generations, drafted.generations)
        for divergence in divergences:
            logger.warning("speculative decoding differs from plain decoding: %s", divergence)
    return summarise(
        [generation.accepted for generation in drafted.generations],
        draft_tokens=draft_tokens,
        seconds=sum(drafted.seconds),
        plain_seconds=sum(plain.seconds) if plain is not None else None,
        lossless=all(divergence.tie for divergence in divergences) if plain is not None else None,
        divergences=divergences,
    )


def summarise(
    accepted: Sequence[Sequence[int]],
    *,
    draft_tokens: int,
    seconds: float,
    lossless: bool | None = None,
    plain_seconds: float | None = None,
    divergences: Sequence[Divergence] = (),
) -> AcceptLength:
    """Return the result of passes that kept `accepted` drafted tokens each, a sequence of counts for each prompt.

    Raises:
        EvaluationFailed: there was no pass at all.
    """
    passes = sum(len(counts) for counts in accepted)
    if passes == 0:
        raise EvaluationFailed(
            f"expected at least one target pass, found none: all {len(accepted)} prompts ended with their first token; "
            "evaluate on prompts that have a continuation"
        )
    kept = sum(sum(counts) for counts in accepted)
    reached = np.bincount([count for counts in accepted for count in counts], minlength=draft_tokens + 1)
    return AcceptLength(
        accept_length=1.0 + kept / passes,
        per_position=(reached[::-1].cumsum()[::-1][1:] / passes).tolist(),
        interval=bootstrap_interval(accepted),
        lossless=lossless,
        prompts=len(accepted),
        tokens=kept + passes,
        target_passes=passes,
        draft_tokens=draft_tokens,
        seconds=seconds,
        plain_seconds=plain_seconds,
        divergences=list(divergences),
        by_prompt=[(sum(counts) + len(counts), len(counts)) for counts in accepted],
    )


def bootstrap_interval(
    accepted: Sequence[Sequence[int]], *, level: float = 0.95, samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the accept length, resampling whole prompts.

    Passes of one prompt resemble each other, so it is the prompts that are drawn, with replacement; the accept length
    of a draw is the ratio of its sums.
    """
    counted = [(sum(counts), len(counts)) for counts in accepted if counts]
    kept, passes = np.array(counted, dtype=np.float64).T
    draws = np.random.default_rng(seed).integers(0, len(counted), size=(samples, len(counted)))
    lengths = 1.0 + kept[draws].sum(axis=1) / passes[draws].sum(axis=1)
    low, high = np.quantile(lengths, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _divergences(
    target: nn.Module,
    prompts: Sequence[Sequence[int]],
    plain: Sequence[Generation],
    speculative: Sequence[Generation],
) -> list[Divergence]:
    """Return the first difference of each prompt, judged by the logits of one pass over the common prefix."""
    found = []
    for index, (one, other) in enumerate(zip(plain, speculative, strict=True)):
        pairs = enumerate(zip(one.tokens, other.tokens, strict=False))
        parting = next((position for position, (a, b) in pairs if a != b), None)
        if parting is None:
            if len(one.tokens) != len(other.tokens):
                raise EvaluationFailed(
                    f"prompt {index}: expected {len(one.tokens)} tokens, found {len(other.tokens)} with a common prefix"
                )
            continue
        first, second = one.tokens[parting], other.tokens[parting]
        margin, scale, dtype = _margin(target, [*prompts[index], *one.tokens[:parting]], first, second)
        found.append(Divergence(index, parting, first, second, margin, abs(margin) <= _TIE[dtype] * scale))
    return found


@torch.inference_mode()
def _margin(target: nn.Module, ids: Sequence[int], first: int, second: int) -> tuple[float, float, torch.dtype]:
    """Return by how much `first` leads `second` after `ids`, the largest logit and their dtype."""
    model: Any = target
    device = model.get_input_embeddings().weight.device
    logits = model(input_ids=torch.tensor([list(ids)], device=device)).logits[0, -1]
    return float(logits[first] - logits[second]), float(logits.abs().max()), logits.dtype
