"""One optimizer step over a window, on every rank: forward, backward, one reduction, clip, AdamW.

Gradients of a window are reduced once, with its last micro-batch. The loss divides by the unmasked positions of the
window over all ranks, while FSDP2 averages gradients over ranks, so the loss is scaled by their number. A micro-batch
with nothing to train on runs as a dummy whose loss weighs zero, because all ranks must do the same collectives.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from disagg_core.drafts.eagle3 import Eagle3Batch, Eagle3Draft, TttOutput, simulated_accept_length
from disagg_core.drafts.eagle3.options import LossSection
from disagg_core.errors import TrainingDiverged
from disagg_core.run_spec.document import TrainingSection
from disagg_core.training.distributed import Ranks, ShardedModule
from disagg_core.training.loader import TrainingWindow
from disagg_core.training.optimizer import NamedParameters, Schedule, build_optimizer, clip_gradients

_DUMMY_TOKENS = 4
_SUMMED = ("step_losses", "correct", "denominators", "accepted", "live")


@dataclass(frozen=True)
class StepResult:
    """Figures of one optimizer step over all ranks. Lists have one entry for each test step k."""

    loss: float
    step_losses: list[float]
    accuracies: list[float]
    acceptance_rates: list[float]
    simulated_accept_length: float
    learning_rate: float
    grad_norm: float
    samples: int
    tokens: int


class OptimizerStep:
    """Trains one window at a time. Holds the sharded loss module, the optimizer and the schedule."""

    def __init__(
        self,
        module: Callable[..., TttOutput],
        sharded: ShardedModule,
        draft: Eagle3Draft,
        *,
        ranks: Ranks,
        section: TrainingSection,
        loss: LossSection,
        schedule: Schedule,
    ) -> None:
        """`module` is the loss module as it is called (compiled or not), `sharded` the same under FSDP2."""
        self._module = module
        self._sharded = sharded
        self._ranks = ranks
        self._loss = loss
        self._max_grad_norm = section.max_grad_norm
        self._accumulation_steps = section.accumulation_steps
        self._schedule = schedule
        self._target_hidden = draft.config.target_hidden_size
        self.parameters: NamedParameters = {n: p for n, p in draft.named_parameters() if p.requires_grad}
        self.optimizer = build_optimizer(self.parameters.values(), section)

    def run(self, window: TrainingWindow, step: int) -> StepResult | None:
        """Do optimizer step `step` (0-based) on `window`; return None, doing nothing, if it has no unmasked position.

        Raises:
            TrainingDiverged: the gradient is not finite. The weights are no longer usable.
        """
        live, samples, tokens = self._ranks.sum([window.live_positions, window.samples, window.tokens])
        if live == 0:
            return None
        sums = self._backward(window, torch.tensor(live, dtype=torch.float32, device=self._ranks.device))
        learning_rate = self._schedule.at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = clip_gradients(self.parameters.values(), self._max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self._result(sums, float(norm), learning_rate, int(samples), int(tokens), step)

    def _backward(self, window: TrainingWindow, normaliser: Tensor) -> Tensor:
        """Accumulate and reduce the window's gradients; return this rank's sums, [5, L]."""
        scale = float(self._ranks.size) if self._loss.normalisation == "valid" else 1.0 / self._accumulation_steps
        sums: Tensor | None = None
        last = len(window.batches) - 1
        for index, batch in enumerate(window.batches):
            self._sharded.set_requires_gradient_sync(index == last)
            self._sharded.set_reshard_after_backward(index == last)
            weight = 0.0 if batch is None else scale
            output = self._module(self._on_device(batch), normaliser=normaliser)
            torch.autograd.backward(output.total * weight)
            if batch is not None:
                sums = _sums_of(output) if sums is None else sums + _sums_of(output)
            else:
                sums = torch.zeros_like(_sums_of(output)) if sums is None else sums
        assert sums is not None
        return sums

    def _on_device(self, batch: Eagle3Batch | None) -> Eagle3Batch:
        if batch is None:
            batch = self._dummy()
        return batch.to(self._ranks.device)

    def _dummy(self) -> Eagle3Batch:
        """Return one short sample; its loss is multiplied by zero."""
        shape = (1, _DUMMY_TOKENS)
        return Eagle3Batch(
            input_ids=torch.zeros(shape, dtype=torch.int64),
            attention_mask=torch.ones(shape, dtype=torch.bool),
            loss_mask=torch.zeros(shape, dtype=torch.bool),
            aux_hidden_states=torch.zeros(*shape, 3 * self._target_hidden),
            last_hidden_state=torch.zeros(*shape, self._target_hidden),
        )

    def _result(
        self, sums: Tensor, norm: float, learning_rate: float, samples: int, tokens: int, step: int
    ) -> StepResult:
        """Sum the counts over ranks, then divide."""
        losses, correct, positions, accepted, live = self._ranks.sum_tensor(sums.to("cpu", torch.float64)).tolist()
        if self._loss.normalisation == "compat":
            losses = [loss / (self._accumulation_steps * self._ranks.size) for loss in losses]
        loss = sum(self._loss.step_decay**k * value for k, value in enumerate(losses))
        if not (math.isfinite(norm) and math.isfinite(loss)):
            raise TrainingDiverged(
                f"step {step}: expected a finite loss and gradient, found loss {loss} and gradient norm {norm}; "
                "lower training.learning_rate, or look for samples with non-finite hidden states"
            )
        accuracies = [c / max(d, 1.0) for c, d in zip(correct, positions, strict=True)]
        return StepResult(
            loss=loss,
            step_losses=losses,
            accuracies=accuracies,
            acceptance_rates=[a / max(d, 1.0) for a, d in zip(accepted, live, strict=True)],
            simulated_accept_length=float(simulated_accept_length(accuracies)),
            learning_rate=learning_rate,
            grad_norm=norm,
            samples=samples,
            tokens=tokens,
        )


def _sums_of(output: TttOutput) -> Tensor:
    """Return the figures of one micro-batch that may be summed: one row for each name in `_SUMMED`, [5, L]."""
    return torch.stack([getattr(output, name).detach().float() for name in _SUMMED])
