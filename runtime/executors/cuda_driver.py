"""NVIDIA's driver library through ctypes: load compiled kernels, launch them on a stream. Knows no
tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...spec.errors import DeviceLostError, TargetError

_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_BYTES_PER_BLOCK = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_UNASKED_SHARED_BYTES = 48 << 10
_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
# Errors after which the context is of no use: an uncorrectable memory error, and what a kernel can do wrong
# (illegal address, assertion, hardware stack, instruction, alignment, address space, counter, launch),
# unknown.
_LOST = frozenset({214, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 999})


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h, whose value has 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


def early_start() -> LaunchAttribute:
    """The attribute of a launch that may begin before the one ahead of it has ended."""
    early = LaunchAttribute(id=_PROGRAMMATIC_SERIALIZATION)
    early.value[0] = 1
    return early


@dataclass(frozen=True, slots=True)
class Function:
    """A loaded kernel. It is valid as long as its driver is."""

    handle: ctypes.c_void_p
    threads: int
    shared_bytes: int


class CudaDriver:
    """The driver of one device. The calling thread must have a current context, as torch makes one.

    Raises TargetError when there is no driver.
    """

    def __init__(self, library: str = "libcuda.so.1", device: int = 0) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise TargetError(
                "cuda.no_driver",
                "The artifact needs an NVIDIA GPU.",
                f"The driver's library {library} cannot be loaded: {error}.",
                "Install NVIDIA's driver, or compile the model with --target cpu.",
            ) from error
        self._modules: list[ctypes.c_void_p] = []
        self.call("cuInit", 0)
        handle, most = ctypes.c_int(), ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(handle), device)
        self.call("cuDeviceGetAttribute", ctypes.byref(most), _SHARED_BYTES_PER_BLOCK, handle)
        self._most_shared_bytes = most.value

    def load(
        self, code: bytes, name: str, *, warps: int, shared_bytes: int, sizes: Sequence[int]
    ) -> Function:
        """Kernel `name` of a cubin, or of PTX, which the driver compiles first.

        `sizes` are the bytes of the parameters that launches will pass. Raises TargetError when the device
        cannot run the code or has too little shared memory, or the code takes other parameters.
        """
        if shared_bytes > self._most_shared_bytes:
            raise _refused(
                name, f"it needs {shared_bytes} bytes of shared memory of {self._most_shared_bytes}"
            )
        module, handle = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(code))
        self._modules.append(module)
        self.call("cuModuleGetFunction", ctypes.byref(handle), module, name.encode())
        if shared_bytes > _UNASKED_SHARED_BYTES:
            self.call("cuFuncSetAttribute", handle, _DYNAMIC_SHARED_BYTES, shared_bytes)
        self._check_parameters(handle, name, sizes)
        return Function(handle=handle, threads=32 * warps, shared_bytes=shared_bytes)

    def launch(
        self,
        function: Function,
        grid: tuple[int, int, int],
        stream: int,
        parameters: Sequence[Any],
        *,
        overlaps: bool = False,
    ) -> None:
        """Enqueue a launch; `parameters` are ctypes values, to which the two scratch pointers that triton's
        kernels take are added. With `overlaps` it may begin before the launch ahead has ended, for which the
        kernel must wait itself. Raises TargetError when the driver refuses."""
        early = early_start()
        config = LaunchConfig(
            grid=grid,
            block=(function.threads, 1, 1),
            shared_bytes=function.shared_bytes,
            stream=stream,
            attributes=ctypes.addressof(early) if overlaps else None,
            num_attributes=int(overlaps),
        )
        passed = [*parameters, ctypes.c_void_p(), ctypes.c_void_p()]
        addresses = (ctypes.c_void_p * len(passed))(*(ctypes.addressof(value) for value in passed))
        self.call("cuLaunchKernelEx", ctypes.byref(config), function.handle, addresses, None)

    @property
    def launch_function(self) -> Any:
        """cuLaunchKernelEx itself, for who makes many calls of it and gives what they return to `check`."""
        return self._library.cuLaunchKernelEx

    def _check_parameters(self, handle: ctypes.c_void_p, name: str, sizes: Sequence[int]) -> None:
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        found: list[int] = []
        query = getattr(self._library, "cuFuncGetParamInfo", None)
        if query is None:  # drivers before 12.4; the files were checked when they were made
            return
        while not query(handle, len(found), ctypes.byref(offset), ctypes.byref(size)):
            found.append(size.value)
        if found != list(sizes):
            raise _refused(name, f"its parameters have {found} bytes, and a launch passes {list(sizes)}")

    def require(self, toolkit: str, *, compiles: bool = False) -> None:
        """Raises TargetError where the driver is older than the toolkit (such as 12.8) whose assembler made
        the kernels: any driver of its generation, or a newer one, runs machine code. With `compiles` it makes
        that from PTX, of which each version of CUDA has its own and knows those before."""
        version = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        supported = (version.value // 1000, version.value % 1000 // 10)
        major, minor = (int(part) for part in toolkit.split(".")[:2])
        needed = (major, minor if compiles else 0)
        if supported < needed:
            raise TargetError(
                "cuda.old_driver",
                "The driver of this machine is too old for the artifact's kernels.",
                f"It supports CUDA {_dotted(supported)}, and they were made with CUDA {toolkit}"
                + (", whose PTX it would have to compile." if compiles else "."),
                f"Install a driver for CUDA {_dotted(needed)} or newer.",
            )

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver. Raises TargetError with the driver's reason when it fails, and
        DeviceLostError where no other call will work after it."""
        self.check(function, getattr(self._library, function)(*arguments))

    def check(self, function: str, code: int) -> None:
        """Raises as `call` does where `function` of the driver returned `code`."""
        if not code:
            return
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(code, ctypes.byref(text))
        reason = f"{function} failed with code {code}: {(text.value or b'an unknown error').decode()}."
        if code in _LOST:
            raise lost_device(reason)
        raise TargetError(
            "cuda.driver",
            "The GPU's driver reported an error.",
            reason,
            "Check the device with nvidia-smi and start again; an artifact cannot cause this by itself.",
        )


def lost_device(reason: str) -> DeviceLostError:
    """What to raise when a step broke the device's context."""
    return DeviceLostError(
        "cuda.device_lost",
        "The GPU failed in a step.",
        reason,
        "The requests of that step are lost, and a server starts its engine again. If it happens again, "
        "check the device with nvidia-smi.",
    )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _refused(name: str, why: str) -> TargetError:
    return TargetError(
        "cuda.kernel_refused",
        f"Kernel {name!r} cannot run on this GPU.",
        f"The reason: {why}.",
        "Compile the model again for this GPU's architecture.",
    )
