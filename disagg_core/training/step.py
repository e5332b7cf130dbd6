"""One optimizer step over a window, on every rank: forward, backward, one reduction, clip, AdamW.

Gradients of a window are reduced once, with its last micro-batch. The loss divides by sums over the whole window on all
ranks, while FSDP2 averages gradients over ranks, so the loss is scaled by their number. A micro-batch with nothing to
train on runs as a dummy whose loss weighs zero, because all ranks must do the same collectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from disagg_core.drafts.figures import Figures, LossOutput, Ratio
from disagg_core.drafts.method import Batch, Batcher, DraftMethod, DraftModel
from disagg_core.run_spec.document import TrainingSection
from disagg_core.training.distributed import Ranks, ShardedModule
from disagg_core.training.inputs import DraftBatches
from disagg_core.training.optimizer import NamedParameters, Schedule, build_optimizer, clip_gradients
from disagg_core.training.phase_clock import PhaseClock


@dataclass(frozen=True)
class StepResult:
    """Figures of one optimizer step over all ranks; `figures` are the method's, `loss` among them."""

    figures: Figures
    learning_rate: float
    grad_norm: float
    samples: int
    tokens: int

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are; where not, the weights are those from before the window."""
        return math.isfinite(self.grad_norm) and math.isfinite(self.loss)

    def fault(self) -> str:
        """Say what is not finite."""
        return f"not trained on: the window's loss is {self.loss}, its gradient norm {self.grad_norm}"

    @property
    def loss(self) -> float:
        """The window's loss."""
        loss = self.figures["loss"]
        assert isinstance(loss, float)
        return loss

    def record(self) -> dict[str, float | list[float]]:
        """Return all figures as one flat record."""
        rates = {"learning_rate": self.learning_rate, "grad_norm": self.grad_norm}
        return {**self.figures, **rates, "samples": self.samples, "tokens": self.tokens}


class OptimizerStep:
    """Trains one window at a time. Holds the sharded loss module, the optimizer and the schedule."""

    def __init__(
        self,
        module: Callable[[Batch, Mapping[str, Tensor]], LossOutput],
        sharded: ShardedModule,
        draft: DraftModel,
        *,
        method: DraftMethod,
        batcher: Batcher,
        ranks: Ranks,
        section: TrainingSection,
        schedule: Schedule,
        clock: PhaseClock | None = None,
    ) -> None:
        """`module` is the loss module as it is called (compiled or not), `sharded` the same under FSDP2."""
        self._module = module
        self._sharded = sharded
        self._method = method
        self._batcher = batcher
        self._ranks = ranks
        self._max_grad_norm = section.max_grad_norm
        self._schedule = schedule
        self._clock = clock or PhaseClock()
        self.parameters: NamedParameters = {n: p for n, p in draft.named_parameters() if p.requires_grad}
        self.optimizer = build_optimizer(self.parameters.values(), section)
        self.applied = 0
        """How often the weights were changed, or began to be."""

    def run(self, window: DraftBatches, step: int, *, samples: int, tokens: int) -> StepResult | None:
        """Do optimizer step `step` (0-based) on `window`, this rank's part of which has `samples` and `tokens`.

        Returns None, doing nothing, if no rank has a position to train on.

        Where loss or gradient is not finite, on any rank, the weights stay as they are on all of them.
        """
        self._clock.enter("reduce")
        names = sorted(window.normalisers)
        counts = [window.live_positions, samples, tokens]
        live, *summed = self._ranks.sum([*counts, *(window.normalisers[name] for name in names)])
        if live == 0:
            return None
        device = self._ranks.device
        normalisers = {name: torch.tensor(value, device=device) for name, value in zip(names, summed[2:], strict=True)}
        tally = self._backward(window, normalisers)
        self._clock.enter("optimizer")
        learning_rate = self._schedule.at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = clip_gradients(self.parameters.values(), self._max_grad_norm)
        self._clock.enter("reduce")
        figures = self._method.figures(tally.summed(self._ranks))
        result = StepResult(figures, learning_rate, float(norm), int(summed[0]), int(summed[1]))
        self._clock.enter("optimizer")
        if result.finite:
            self.applied += 1
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _backward(self, window: DraftBatches, normalisers: Mapping[str, Tensor]) -> _Tally:
        """Accumulate and reduce the window's gradients; return this rank's figures."""
        tally = _Tally()
        last = len(window.batches) - 1
        for index, batch in enumerate(window.batches):
            self._sharded.set_requires_gradient_sync(index == last)
            self._sharded.set_reshard_after_backward(index == last)
            weight = 0 if batch is None else self._ranks.size
            given = self._batcher.dummy() if batch is None else batch
            self._clock.enter("h2d")
            given = given.to(self._ranks.device)
            self._clock.enter("forward")
            output = self._module(given, normalisers)
            self._clock.enter("backward")
            total = output.total * weight
            if index == last:
                self._clock.reduce_after(total)
            torch.autograd.backward(total)
            tally.add(output.ratios, counts=batch is not None)
        return tally


class _Tally:
    """Sums the figures of micro-batches, then of ranks; all ranks add outputs of the same names and shapes."""

    def __init__(self) -> None:
        self._like: Mapping[str, Ratio] = {}
        self._sums: Tensor | None = None

    def add(self, ratios: Mapping[str, Ratio], *, counts: bool) -> None:
        """Add the figures of one micro-batch; those of one that does not count only tell the shapes."""
        parts = torch.cat([part.detach().flatten().float() for part in _parts(ratios)])
        parts = parts if counts else torch.zeros_like(parts)
        self._like = ratios
        self._sums = parts if self._sums is None else self._sums + parts

    def summed(self, ranks: Ranks) -> dict[str, Ratio]:
        """Return the figures over all ranks, in double precision on the CPU. A collective."""
        assert self._sums is not None
        sums = ranks.sum_tensor(self._sums.to("cpu", torch.float64))
        split = iter(torch.split(sums, [part.numel() for part in _parts(self._like)]))
        return {name: Ratio(next(split), next(split)) for name in self._like}


def _parts(ratios: Mapping[str, Ratio]) -> Iterable[Tensor]:
    return (part for ratio in ratios.values() for part in (ratio.numerator, ratio.denominator))
