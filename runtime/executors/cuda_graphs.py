"""Launches recorded once and replayed by one call, through NVIDIA's driver. Knows streams and graphs; not
what is launched."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from .cuda_driver import CudaDriver

# CU_STREAM_CAPTURE_MODE_RELAXED: what torch asks of the driver while it records (memory of its own) is
# allowed.
_RELAXED = 2


class Recorded:
    """A graph that can be replayed on its stream, as long as the memory that it works in stays."""

    def __init__(self, driver: CudaDriver, handle: ctypes.c_void_p, stream: int) -> None:
        self._driver = driver
        self._handle = handle
        self._stream = ctypes.c_void_p(stream)

    def replay(self) -> None:
        """Enqueue everything that was recorded. Raises TargetError when the driver refuses."""
        self._driver.call("cuGraphLaunch", self._handle, self._stream)

    def close(self) -> None:
        """Give it back. Idempotent."""
        if self._handle.value:
            self._driver.call("cuGraphExecDestroy", self._handle)
            self._handle = ctypes.c_void_p()


def record(driver: CudaDriver, stream: int, work: Callable[[], None]) -> Recorded:
    """What `work` enqueues on `stream`, which must not wait for anything, as a graph; it is not carried out.

    Raises TargetError when the driver refuses. An error of `work` ends the recording and goes on.
    """
    on = ctypes.c_void_p(stream)
    graph, handle = ctypes.c_void_p(), ctypes.c_void_p()
    driver.call("cuStreamBeginCapture_v2", on, _RELAXED)
    try:
        work()
    finally:
        driver.call("cuStreamEndCapture", on, ctypes.byref(graph))
    driver.call("cuGraphInstantiateWithFlags", ctypes.byref(handle), graph, ctypes.c_ulonglong(0))
    driver.call("cuGraphDestroy", graph)
    return Recorded(driver, handle, stream)
