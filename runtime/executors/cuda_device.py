"""The stream, the staging memory and the waiting of one device, by torch. On the CPU, where kernels are
interpreted, everything has happened when a call returns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cuda_driver import lost_device


class Device:
    """A device and the one stream on which all of its work is enqueued, in order."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._stream = torch.cuda.Stream(name) if self.is_cuda else None
        self._pool = torch.cuda.MemPool() if self.is_cuda else None

    @property
    def is_cuda(self) -> bool:
        return self.name.startswith("cuda")

    @property
    def stream(self) -> int:
        """The stream's handle, for the driver."""
        return 0 if self._stream is None else self._stream.cuda_stream

    def scope(self) -> AbstractContextManager[object]:
        """Within it torch works on the stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def settle(self) -> None:
        """Waits for everything, on whichever stream it was enqueued: what is loaded is there from now on."""
        if self.is_cuda:
            torch.cuda.synchronize(self.name)

    def own_memory(self) -> AbstractContextManager[object]:
        """Within it torch takes memory that nothing outside of such scopes is ever given: what a captured
        step uses beside its arena must not be anybody else's when it is replayed."""
        if self._pool is None:
            return nullcontext()
        return torch.cuda.use_mem_pool(self._pool, self.name)

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros in memory of the CPU that copies to and from the device need not wait for."""
        return torch.zeros(shape, dtype=dtype, pin_memory=self.is_cuda)

    def zeros(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Zeros on the device; `dtype` by name."""
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=self.name)

    def sent(self, values: NDArray[Any]) -> Tensor:
        """`values` on the device, without waiting for what is enqueued there."""
        return self._pinned(values).to(self.name, non_blocking=True)

    def put(self, values: NDArray[Any], target: Tensor) -> None:
        """Enqueues a copy of `values` to a tensor of the device."""
        target.copy_(self._pinned(values), non_blocking=True)

    def _pinned(self, values: NDArray[Any]) -> Tensor:
        """A copy that the device can read by itself: from other memory a copy waits for all that is enqueued.
        torch gives its memory to nobody else before it was read."""
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor.pin_memory() if self.is_cuda else tensor

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Enqueues a copy between the device and staging memory."""
        target.copy_(source, non_blocking=True)

    def mark(self) -> Callable[[], None]:
        """A call that waits until everything enqueued so far is done. It raises DeviceLostError where a
        kernel failed."""
        if self._stream is None:
            return _nothing
        event = torch.cuda.Event()
        event.record(self._stream)

        def wait() -> None:
            try:
                event.synchronize()
            except RuntimeError as error:
                raise lost_device(str(error).splitlines()[0]) from error

        return wait


def _nothing() -> None:
    """There is nothing to wait for."""
