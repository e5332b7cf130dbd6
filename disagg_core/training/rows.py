"""Tensors of which every rank has some rows (DTensors), and whole ones, told apart in one place."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor


def own_rows(tensor: Tensor) -> Tensor:
    """Return the rows of `tensor` that this rank has, in the same memory: all of them where it is whole."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_as(like: Tensor, rows: Tensor, mesh: DeviceMesh | None = None) -> Tensor:
    """Return `rows`, this rank's, as a tensor of the shape and placement of `like`, on its mesh or on `mesh`."""
    if not isinstance(like, DTensor):
        return rows
    return DTensor.from_local(
        rows, mesh or like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def gathered(like: Tensor, rows: Tensor) -> Tensor:
    """Return the whole tensor of which every rank has `rows`, placed as `like` is. A collective."""
    placed = placed_as(like, rows)
    return placed.full_tensor() if isinstance(placed, DTensor) else placed


def rows_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return this rank's rows of `whole`, which all ranks have, as `like` is placed; nothing is sent."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()
