"""One optimizer step over a window, on every rank: forward, backward, one reduction, clip, update.

Gradients of a window are reduced once, with its last micro-batch. The loss divides by sums over the whole window on all
ranks, while FSDP2 averages gradients over ranks, so the loss is scaled by their number. A micro-batch with nothing to
train on runs as a dummy whose loss weighs zero, because all ranks must do the same collectives.

Nothing in a step waits for the device. Whether loss and gradient are finite is decided there, and the optimizer leaves
weights and its state as they are where they are not; the figures travel to pinned memory, and whoever reads them waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from disagg_core.drafts.figures import Figures, LossOutput, Ratio
from disagg_core.drafts.method import Batch, Batcher, DraftMethod, DraftModel
from disagg_core.run_spec.document import TrainingSection
from disagg_core.training.distributed import Ranks, ShardedModule
from disagg_core.training.inputs import DraftBatches
from disagg_core.training.optimizer import (
    NamedParameters,
    Schedule,
    clip_gradients,
    update_unless,
)
from disagg_core.training.optimizers import optimizer_for
from disagg_core.training.phase_clock import PhaseClock


@dataclass(frozen=True)
class StepResult:
    """Figures of one optimizer step over all ranks; `figures` are the method's, `loss` among them.

    `finite` tells whether loss and gradient are; where not, the weights are those from before the window.
    """

    figures: Figures
    learning_rate: float
    grad_norm: float
    finite: bool
    samples: int
    tokens: int

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


class QueuedStep:
    """An optimizer step that was given to the device; its figures are on their way to the host."""

    def __init__(
        self, method: DraftMethod, ranks: Ranks, tally: _Tally, verdict: Tensor, rest: tuple[float, int, int]
    ) -> None:
        """`verdict` [2] on the device: gradient norm, and 0 where all is finite; `rest`: rate, samples, tokens."""
        self._method, self._ranks, self._tally, self._rest = method, ranks, tally, rest
        self._numbers = torch.cat((verdict, tally.sums))
        self._arrived: torch.cuda.Event | None = None
        if self._numbers.is_cuda:
            on_device = self._numbers
            self._numbers = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            self._numbers.copy_(on_device, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def result(self) -> StepResult:
        """Return the figures over all ranks, once the device has them. A collective; to be called once."""
        if self._arrived is not None:
            self._arrived.synchronize()
        norm, fault = self._numbers[:2].tolist()
        figures = self._method.figures(self._tally.split(self._ranks.sum_tensor(self._numbers[2:].double())))
        rate, samples, tokens = self._rest
        return StepResult(figures, rate, norm, fault == 0, samples, tokens)


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
        self._idle: Batch | None = None
        self.parameters: NamedParameters = {n: p for n, p in draft.named_parameters() if p.requires_grad}
        self.optimizer = optimizer_for(draft, section, ranks.device)
        self.applied = 0
        """How often the weights were changed, or began to be."""

    def run(
        self,
        window: DraftBatches,
        step: int,
        *,
        samples: int,
        tokens: int,
        recount: Callable[[], int] | None = None,
    ) -> QueuedStep | None:
        """Do optimizer step `step` (0-based) on `window`, this rank's part of which has `samples` and `tokens`.

        Returns None, doing nothing, if no rank has a position to train on.

        Where loss or gradient is not finite, on any rank, the weights stay as they are on all of them.

        `recount` gives the step's number in place of `step`, which was given before the figures of the window before
        were read. It may wait for them: the device has this window's passes to go on with.
        """
        self._clock.enter("reduce")
        names = sorted(window.normalisers)
        counts = [window.live_positions, samples, tokens]
        live, *summed = self._ranks.sum_of_data([*counts, *(window.normalisers[name] for name in names)])
        if live == 0:
            return None
        device = self._ranks.device
        normalisers = {
            name: torch.full((), value, device=device) for name, value in zip(names, summed[2:], strict=True)
        }
        tally = self._backward(window, normalisers)
        self._clock.enter("optimizer")
        learning_rate = self._schedule.at(step if recount is None else recount())
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = clip_gradients(self.parameters.values(), self._max_grad_norm)
        fault = self._fault(norm, tally)
        self.applied += 1
        update_unless(fault, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        verdict = torch.stack((norm.float(), fault))
        return QueuedStep(self._method, self._ranks, tally, verdict, (learning_rate, int(summed[0]), int(summed[1])))

    def _dummy(self) -> Batch:
        """Return the batch without samples, which is made once."""
        if self._idle is None:
            self._idle = self._batcher.dummy().to(self._ranks.device)
        return self._idle

    def _fault(self, norm: Tensor, tally: _Tally) -> Tensor:
        """Return 0 where the gradient's norm and, on all ranks, the loss are finite, else 1; fp32, on the device."""
        fault = torch.logical_not(torch.isfinite(norm) & torch.isfinite(tally.loss)).float()
        if self._ranks.size > 1:
            dist.all_reduce(fault, dist.ReduceOp.MAX)
        return fault

    @torch.no_grad()
    def measure(self, window: DraftBatches) -> Figures:
        """Return the figures of `window`, of which this rank has a part, over all ranks; nothing is changed.

        On a CPU compiled code is left aside: its shapes would be compiled for this alone. A GPU keeps it: FlexAttention
        that is not compiled holds all scores at once.
        """
        names = sorted(window.normalisers)
        summed = self._ranks.sum_of_data([window.normalisers[name] for name in names])
        device = self._ranks.device
        normalisers = {name: torch.tensor(value, device=device) for name, value in zip(names, summed, strict=True)}
        tally = _Tally()
        with torch.compiler.set_stance("force_eager" if device.type == "cpu" else "default"):
            for batch in window.batches:
                given = self._dummy() if batch is None else batch.to(device)
                output = self._module(given, normalisers)
                tally.add(output.ratios, counts=batch is not None)
        self._sharded.reshard()
        return self._method.figures(tally.split(self._ranks.sum_tensor(tally.sums.cpu().double())))

    def _backward(self, window: DraftBatches, normalisers: Mapping[str, Tensor]) -> _Tally:
        """Accumulate and reduce the window's gradients; return this rank's figures."""
        self._clock.enter("h2d")
        window.join()
        tally = _Tally()
        last = len(window.batches) - 1
        for index, batch in enumerate(window.batches):
            self._sharded.set_requires_gradient_sync(index == last)
            self._sharded.set_reshard_after_backward(index == last)
            weight = 0 if batch is None else self._ranks.size
            self._clock.enter("h2d")
            given = self._dummy() if batch is None else batch.to(self._ranks.device, non_blocking=True)
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
    """Sums the figures of micro-batches on the device; all ranks add outputs of the same names and shapes."""

    def __init__(self) -> None:
        self._sizes: dict[str, tuple[int, int]] = {}
        self._sums: Tensor | None = None
        self._loss: list[Tensor] = []

    @property
    def sums(self) -> Tensor:
        """All figures of the micro-batches, fp32, one after the other."""
        assert self._sums is not None
        return self._sums

    @property
    def loss(self) -> Tensor:
        """A number that is finite exactly where this rank's loss is."""
        return torch.stack(self._loss).sum()

    def add(self, ratios: Mapping[str, Ratio], *, counts: bool) -> None:
        """Add the figures of one micro-batch; those of one that does not count only tell the shapes."""
        parts = torch.cat([part.detach().flatten().float() for part in _parts(ratios)])
        parts = parts if counts else torch.zeros_like(parts)
        self._sizes = {name: (ratio.numerator.numel(), ratio.denominator.numel()) for name, ratio in ratios.items()}
        self._sums = parts if self._sums is None else self._sums + parts
        if counts or not self._loss:
            loss = ratios["loss"].numerator.detach().sum()
            self._loss.append(loss if counts else torch.zeros_like(loss))

    def split(self, sums: Tensor) -> dict[str, Ratio]:
        """Return the figures that `sums`, over all ranks, are."""
        split = iter(torch.split(sums, [size for pair in self._sizes.values() for size in pair]))
        return {name: Ratio(next(split), next(split)) for name in self._sizes}


def _parts(ratios: Mapping[str, Ratio]) -> Iterable[Tensor]:
    return (part for ratio in ratios.values() for part in (ratio.numerator, ratio.denominator))
