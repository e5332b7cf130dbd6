"""Which side of a run is the slower one, and what to do about it, as one line for people.

The words are those of the field: a run is *inference-bound* when training waits for samples, *training-bound* when
capture waits for space, *store-bound* when training waits for features whose references it has already. I and T are
the capacities of the two sides, in samples a second: what each would do if the other one never held it up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from disagg_core.run.phases import share_field, shares_of
from disagg_core.run.progress import ProgressValue
from disagg_core.run_spec.document import RunSpec

Bound = Literal["inference-bound", "training-bound", "store-bound", "balanced"]

WAIT_WORTH_NAMING = 0.05
"""A side that waits for less than this share of its time is kept busy."""
LONG_SAVES = 0.03
"""Checkpoints that take more than this share of training's time are named."""


@dataclass(frozen=True)
class Shares:
    """What both sides say of their last minutes; shares are 0 to 1, capacities in samples a second."""

    refs: float
    features: float
    save: float
    space: float
    generate: float
    prefill: float
    infer_capacity: float | None
    train_capacity: float | None

    @classmethod
    def of(cls, producer: Mapping[str, ProgressValue], consumer: Mapping[str, ProgressValue]) -> Shares | None:
        """Return the shares that two progress files hold; None before training has done a step."""
        if share_field("forward") not in consumer:
            return None
        return cls(
            refs=_number(consumer, share_field("refs")) or 0.0,
            features=_number(consumer, share_field("features")) or 0.0,
            save=_number(consumer, share_field("save")) or 0.0,
            space=_number(producer, share_field("space")) or 0.0,
            generate=_number(producer, share_field("generate")) or 0.0,
            prefill=_number(producer, share_field("prefill")) or 0.0,
            infer_capacity=_number(producer, "infer_capacity"),
            train_capacity=_number(consumer, "train_capacity"),
        )

    @classmethod
    def of_sums(
        cls,
        producer: Mapping[str, float],
        training: Mapping[str, float],
        *,
        infer_capacity: float | None,
        train_capacity: float | None,
    ) -> Shares:
        """Return the shares of a whole run from the seconds of its phases."""
        workers, trainer = shares_of(producer), shares_of(training)
        return cls(
            refs=trainer.get("refs", 0.0),
            features=trainer.get("features", 0.0),
            save=trainer.get("save", 0.0),
            space=workers.get("space", 0.0),
            generate=workers.get("generate", 0.0),
            prefill=workers.get("prefill", 0.0),
            infer_capacity=infer_capacity,
            train_capacity=train_capacity,
        )

    @property
    def bound(self) -> Bound:
        """Which side holds the other one up."""
        if max(self.refs, self.features, self.space) < WAIT_WORTH_NAMING:
            return "balanced"
        if self.features >= max(self.refs, self.space):
            return "store-bound"
        return "inference-bound" if self.refs >= self.space else "training-bound"


def bottleneck_line(
    spec: RunSpec, producer: Mapping[str, ProgressValue], consumer: Mapping[str, ProgressValue]
) -> str | None:
    """Return what holds the run up, what to do about it, and how long it will take; None before that is known."""
    shares = Shares.of(producer, consumer)
    if shares is None or consumer.get("phase") == "finished":
        return None
    said = f"{_finding(shares)}{_remedy(spec, shares)}"
    if shares.save > LONG_SAVES:
        said += f"; checkpoints take {shares.save:.0%}: raise training.save_every_steps"
    return said + _eta(producer, consumer)


def finding_of(spec: RunSpec, shares: Shares) -> str:
    """Return what held a finished run up, and what to do about it the next time."""
    return f"{_finding(shares)}{_remedy(spec, shares)}"


def _finding(shares: Shares) -> str:
    rates, bound = _capacities(shares), shares.bound
    match bound:
        case "inference-bound":
            waits = f"training waits {shares.refs + shares.features:.0%} for features"
            return f"inference-bound: {waits}; capture is the slower side{rates}: "
        case "training-bound":
            return f"training-bound: capture waits {shares.space:.0%} for space; training is the slower side{rates}: "
        case "store-bound":
            waits = f"training waits {shares.features:.0%} for features that are in the store already"
            return f"store-bound: {waits}{rates}: "
        case "balanced":
            return f"balanced: neither side waits{rates}"


def _capacities(shares: Shares) -> str:
    inference, training = shares.infer_capacity, shares.train_capacity
    if inference is None or training is None:
        return ""
    return f" (capture {inference:.1f}, training {training:.1f} samples/s at most)"


def _remedy(spec: RunSpec, shares: Shares) -> str:
    bound = shares.bound
    match bound:
        case "inference-bound":
            return " or ".join(_faster_capture(spec, shares))
        case "training-bound":
            return " or ".join(_faster_training(spec))
        case "store-bound":
            rdma = " or use store.protocol: rdma" if spec.store.protocol == "tcp" else ""
            return f"raise training.prefetch_samples{rdma}"
        case "balanced":
            return ""


def _faster_capture(spec: RunSpec, shares: Shares) -> list[str]:
    target, training = spec.target, spec.training
    if target.backend == "transformers":
        ways = ["raise rollout.batch_tokens", "run the target on SGLang servers"]
    elif target.server_urls:
        ways = ["add a rollout server (target.server_urls)"]
    else:
        ways = [f"add one rollout server (target.servers: {target.servers + 1})"]
    if shares.generate > shares.prefill:
        ways.append("lower data.generate.max_new_tokens")
    if training.processes > 1 and training.context_parallel == 1:
        ways.append(f"move a GPU from training (training.processes: {training.processes - 1})")
    return ways


def _faster_training(spec: RunSpec) -> list[str]:
    target, training = spec.target, spec.training
    more = training.context_parallel
    added = "a training rank" if more == 1 else f"{more} training ranks"
    ways = [f"add {added} (training.processes: {training.processes + more})"]
    if target.backend == "sglang" and not target.server_urls and target.servers > 1:
        ways = [f"move a GPU from capture (target.servers: {target.servers - 1}, training.processes)"]
    if not training.compile and training.device != "cpu":
        ways.append("try training.compile")
    return ways


def _eta(producer: Mapping[str, ProgressValue], consumer: Mapping[str, ProgressValue]) -> str:
    """Say how long the slower side will take."""
    known = [left for left in (_number(producer, "left_s"), _number(consumer, "left_s")) if left is not None]
    return f"; {describe_left(max(known))}" if known and max(known) > 0 else ""


def describe_left(seconds: float) -> str:
    """Say how long something will take."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h left"
    return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{seconds:.0f} s left"


def _number(fields: Mapping[str, ProgressValue], name: str) -> float | None:
    value = fields.get(name)
    return float(value) if isinstance(value, (int, float)) else None
