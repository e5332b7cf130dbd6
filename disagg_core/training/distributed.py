"""The trainer's ranks: process group, control messages, sums over ranks, FSDP2 sharding.

Control messages and counts travel over gloo on the CPU, also when gradients travel over NCCL: rank 0 may wait for
references for a long time, and a broadcast that waits on a GPU stream would be killed by NCCL's watchdog. Messages are
bytes that the caller encoded; nothing is pickled.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from types import TracebackType
from typing import Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from disagg_core.drafts.context import Context
from disagg_core.errors import BadInput, FailureClass, RoleFailed, classify

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others; longer than the slowest step or checkpoint."""

_log = logging.getLogger(__name__)


class ShardedModule(Protocol):
    """The part of an FSDP2 module that the trainer drives."""

    def set_requires_gradient_sync(self, requires_gradient_sync: bool) -> None:
        """Reduce gradients over ranks after the next backward, or only accumulate them."""

    def set_reshard_after_backward(self, reshard_after_backward: bool) -> None:
        """Free the gathered weights after the next backward, or keep them for the next forward."""

    def reshard(self) -> None:
        """Free the gathered weights at once."""


@dataclass
class Ranks:
    """This process among the trainer's processes; `control` is None when there is no other.

    With a `context`, ranks that follow each other share samples; there are `data_size` such groups.
    """

    rank: int
    size: int
    device: torch.device
    owns_group: bool
    control: dist.ProcessGroup | None
    context: Context | None = None

    @classmethod
    def join(cls, device: Literal["auto", "cpu", "cuda"] = "auto") -> Ranks:
        """Join the process group that torchrun describes; without torchrun, be the only rank.

        A process group that exists already is used and left alone.

        Raises:
            BadInput: `device` is cuda and there is none.
        """
        chosen = choose_device(device)
        owns_group = not dist.is_initialized()
        if owns_group:
            backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
            if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
                dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
            else:
                store = dist.HashStore()  # type: ignore[attr-defined]  # public, but missing in the stubs
                dist.init_process_group(backend, store=store, rank=0, world_size=1)
        control = None
        if dist.get_world_size() > 1:
            control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT))
        return cls(dist.get_rank(), dist.get_world_size(), chosen, owns_group, control)

    def sharing_context(self, size: int) -> Ranks:
        """Return the same rank, which shares samples with others so that `size` ranks do. A collective.

        Raises:
            BadInput: the number of ranks is not a multiple of `size`.
        """
        if size == 1:
            return self
        if self.size % size:
            raise BadInput(
                f"training.context_parallel: expected a divisor of the number of ranks ({self.size}), found {size}"
            )
        together = [list(range(first, first + size)) for first in range(0, self.size, size)]
        groups = [dist.new_group(ranks, timeout=COLLECTIVE_TIMEOUT) for ranks in together]
        group = cast(dist.ProcessGroup, groups[self.rank // size])
        return replace(self, context=Context(self.rank % size, size, group))

    @property
    def shared_by(self) -> int:
        """How many ranks share each sample."""
        return 1 if self.context is None else self.context.size

    @property
    def data_rank(self) -> int:
        """Which part of a window this rank trains; the ranks that share samples have the same one."""
        return self.rank // self.shared_by

    @property
    def data_size(self) -> int:
        """In how many parts a window is trained."""
        return self.size // self.shared_by

    @property
    def frees(self) -> bool:
        """Whether this is the one of the ranks that share samples which removes them from the store."""
        return self.context is None or self.context.rank == 0

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which reads the channel and writes files."""
        return self.rank == 0

    def broadcast(self, message: bytes, source: int = 0) -> bytes:
        """Return rank `source`'s `message` on every rank; what the others pass is ignored."""
        if self.control is None:
            return message
        length = torch.tensor([len(message)], dtype=torch.int64)
        dist.broadcast(length, src=source, group=self.control)
        if not int(length):
            return b""
        payload = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == source:
            payload = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        dist.broadcast(payload, src=source, group=self.control)
        return payload.numpy().tobytes()

    def gather(self, message: bytes) -> list[bytes]:
        """Return every rank's `message`, by rank, on every rank. Takes one round for each rank: for rare events."""
        return [self.broadcast(message, source) for source in range(self.size)]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of `values` over ranks, in double precision."""
        if self.control is None:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return cast(list[float], total.tolist())

    def sum_of_data(self, values: Sequence[float]) -> list[float]:
        """Return the sums of `values` over the parts of a window: those of ranks that share samples count once."""
        return [total / self.shared_by for total in self.sum(values)]

    def sum_tensor(self, values: Tensor) -> Tensor:
        """Return the sum over ranks of `values`, one CPU tensor of the same shape on every rank."""
        if self.control is not None:
            dist.all_reduce(values, group=self.control)
        return values

    def another_group(self) -> dist.ProcessGroup | None:
        """Return a gloo group over all ranks for a thread of its own; None without a process group. A collective."""
        if not dist.is_initialized():
            return None
        return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT))

    def first_does(self, work: Callable[[], object]) -> None:
        """Have rank 0 do `work`, and all ranks wait for its end: one that left sooner would have torchrun end rank 0.

        Raises:
            RoleFailed: on the other ranks, where it failed; its own error is raised on rank 0.
        """
        if self.is_first:
            try:
                work()
            except BaseException as error:
                self.broadcast(f"{classify(error)} {type(error).__name__}: {error}".encode())
                raise
        failure = self.broadcast(b"").decode()
        if failure and not self.is_first:
            failure_class, reason = failure.split(" ", 1)
            raise RoleFailed(f"rank 0 failed: {reason}", cast(FailureClass, failure_class))

    def leave(self) -> None:
        """Destroy the process group if this object made it."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()


def choose_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return this rank's device; a GPU by its local rank.

    Raises:
        BadInput: cuda was asked for and there is none, or fewer than local ranks.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    found = torch.cuda.device_count()
    if index >= found:
        raise BadInput(
            f"training.device: local rank {index} needs a CUDA device of its own, found {found}; "
            "lower training.processes or set training.device to cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def compute_dtype(precision: Literal["auto", "float32", "bfloat16"], device: torch.device) -> torch.dtype:
    """Return the dtype that the step computes in: with auto, bf16 on GPUs that have it, else fp32."""
    if precision == "auto":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def shard(module: nn.Module, ranks: Ranks, dtype: torch.dtype) -> ShardedModule:
    """Shard the trainable parameters of `module` over all ranks in place (FSDP2); the frozen ones stay whole.

    Masters stay fp32; compute is in `dtype`, gradients are reduced in fp32. Inputs are not cast: the loss normaliser
    is among them.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    if dtype == torch.float32:
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=frozen)
    assert isinstance(module, FSDPModule)
    return module
