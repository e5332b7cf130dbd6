"""Tensors to one aligned buffer and back: the only place that knows how a sample's bytes lie.

One sample is one object in the store. Each tensor starts at a multiple of 64 bytes; name, dtype, shape, offset and
size stand in the reference's `FeatureSpec`s, so the buffer itself holds raw bytes and nothing to interpret. The gaps
are zeroed: equal tensors give equal bytes and an equal checksum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from disagg_core.contracts import FeatureSpec, SampleRef
from disagg_core.errors import BadInput

T = TypeVar("T")

ALIGNMENT = 64
GROUP_BYTES = 8 << 20
GROUP_ITEMS = 64

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
        torch.bool,
    )
}
"""Every dtype that can be stored, by the name that stands in a `FeatureSpec`."""


class Layout(NamedTuple):
    """Where the tensors of one sample lie; `size_bytes` is a multiple of 64, never 0: Mooncake has no empty object."""

    specs: dict[str, FeatureSpec]
    size_bytes: int


def plan_layout(tensors: Mapping[str, Tensor]) -> Layout:
    """Return the layout of `tensors` in the order given.

    Raises:
        BadInput: a value is not a dense tensor of a dtype in `DTYPES`.
    """
    specs: dict[str, FeatureSpec] = {}
    end = 0
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
            raise BadInput(f"feature {name!r}: expected a dense tensor, found {_describe(tensor)}; convert it first")
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise BadInput(f"feature {name!r}: expected one of {', '.join(DTYPES)}, found {dtype}; convert it first")
        nbytes = tensor.numel() * tensor.element_size()
        specs[name] = FeatureSpec(shape=tuple(tensor.shape), dtype=dtype, offset=end, nbytes=nbytes)
        end = _aligned(end + nbytes)
    return Layout(specs, max(end, ALIGNMENT))


def pack_into(buffer: Tensor, tensors: Mapping[str, Tensor], layout: Layout, *, non_blocking: bool = False) -> None:
    """Copy `tensors` (any device, any strides) into `buffer`, a contiguous uint8 tensor of ``layout.size_bytes``.

    With `non_blocking` the caller waits for the GPU's stream before it reads the buffer.
    """
    zero_gaps(buffer, layout)
    for name, spec in layout.specs.items():
        if spec.nbytes:
            _view(buffer, spec).copy_(tensors[name], non_blocking=non_blocking)


def zero_gaps(buffer: Tensor, layout: Layout) -> None:
    """Zero the bytes of `buffer` between and behind the tensors of `layout`."""
    end = 0
    for spec in layout.specs.values():
        if spec.offset > end:
            buffer[end : spec.offset].zero_()
        end = spec.offset + spec.nbytes
    buffer[end : layout.size_bytes].zero_()


def unpack(buffer: Tensor, specs: Mapping[str, FeatureSpec]) -> dict[str, Tensor]:
    """Return views of `buffer`, one for each feature; they share its memory."""
    return {name: _view(buffer, spec) for name, spec in specs.items()}


def check_layout(ref: SampleRef) -> None:
    """Refuse a reference whose features do not fill a buffer of its size as `plan_layout` would.

    Raises:
        BadInput: with the feature, what was expected and what was found.
    """
    end = 0
    for name, spec in ref.feature_specs.items():
        if spec.dtype not in DTYPES:
            raise _damaged(ref, f"feature {name!r}: expected a dtype of torch, found {spec.dtype!r}")
        if min(spec.shape, default=0) < 0:
            raise _damaged(ref, f"feature {name!r}: expected extents of 0 or more, found shape {spec.shape}")
        nbytes = math.prod(spec.shape) * DTYPES[spec.dtype].itemsize
        if (spec.offset, spec.nbytes) != (end, nbytes):
            raise _damaged(
                ref,
                f"feature {name!r} ({spec.dtype} {list(spec.shape)}): expected {nbytes} bytes at offset {end}, "
                f"found {spec.nbytes} bytes at offset {spec.offset}",
            )
        end = _aligned(end + nbytes)
    if ref.size_bytes != max(end, ALIGNMENT):
        raise _damaged(ref, f"the features fill {max(end, ALIGNMENT)} bytes, the reference says {ref.size_bytes}")


def in_a_row(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return where objects of `sizes` begin when they lie one behind the other, and the end of the last."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += size
    return offsets, end


def grouped(items: Sequence[T], sizes: Sequence[int]) -> Iterator[list[T]]:
    """Cut `items` into groups for one call: of at most `GROUP_ITEMS` and `GROUP_BYTES`, or of one larger item."""
    group: list[T] = []
    total = 0
    for item, size in zip(items, sizes, strict=True):
        if group and (total + size > GROUP_BYTES or len(group) == GROUP_ITEMS):
            yield group
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield group


def _damaged(ref: SampleRef, found: str) -> BadInput:
    return BadInput(f"the layout of sample {ref.sample_id} disagrees with itself: {found}; capture the sample again")


def _view(buffer: Tensor, spec: FeatureSpec) -> Tensor:
    raw = buffer[spec.offset : spec.offset + spec.nbytes]
    return raw.view(DTYPES[spec.dtype]).view(spec.shape)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {'quantized' if value.is_quantized else value.layout} tensor of {value.dtype}"
    return f"a {type(value).__module__}.{type(value).__qualname__}"
