"""A device that is pretended on the CPU, to find what would make a host wait for a real one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

_SHAPED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
"""Operations whose result has as many elements as the values say: a host waits for the number."""
_READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
"""What ``item``, ``bool``, ``int``, ``float`` and ``equal`` come down to."""
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class PretendedDevice(TorchDispatchMode):
    """Counts tensors that were `placed`, and all that is computed of them, as a device's.

    `waits` lists each time that a host would have had to wait for one of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._storages: dict[int, Any] = {}  # kept, so that no address comes again

    def place(self, tensors: Iterable[Tensor]) -> None:
        """Have `tensors`, and whatever shares their memory, lie on the device."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr():
                self._storages[storage.data_ptr()] = storage

    def holds(self, value: object) -> bool:
        """Whether `value` is a tensor on the device."""
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._storages

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [value for value in tree_leaves((args, kwargs or {})) if self.holds(value)]
        if given and func in _SHAPED_BY_VALUES | _READS:
            self.waits.append(str(func))
        if func in _INDEXING and any(
            self.holds(i) and i.dtype in (torch.bool, torch.uint8) for i in args[1] if i is not None
        ):
            self.waits.append(f"{func} by a mask")
        result = func(*args, **(kwargs or {}))
        if given:
            self.place(value for value in tree_leaves(result) if isinstance(value, Tensor))
        return result


def watched(device: PretendedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `device` see what hands out values without an operation."""
    for name in ("tolist", "numpy", "cpu", "__array__"):
        plain: Callable[..., Any] = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, _plain: Any = plain, _name: str = name, **kwargs: Any) -> Any:
            if device.holds(self):
                device.waits.append(_name)
            return _plain(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)
