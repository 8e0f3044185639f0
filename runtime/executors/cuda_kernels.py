"""The kernels of an artifact on a device: chosen for its architecture, loaded once, launched by key."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from typing import Any

from ...artifact.cuda import CudaKernel, CudaUnit
from ...artifact.reader import Artifact
from ...kernels.cuda.launch import Launch, Specialisation
from ...spec.errors import InternalError, TargetError
from ...spec.target import CUDA_ARCHITECTURES
from .cuda_driver import CudaDriver, Function
from .cuda_table import LaunchTable, Ready

_ALIGNMENT = 16
_SCALARS: dict[str, Any] = {"i32": ctypes.c_int32, "fp32": ctypes.c_float}


def choose_architecture(unit: CudaUnit, capability: tuple[int, int]) -> str:
    """The stored architecture that a GPU of `capability` runs: its own, or an older one of its generation,
    else the one whose PTX its driver can compile. Raises TargetError naming what is there and what is
    needed."""
    wanted = capability[0] * 10 + capability[1]
    numbers = {int(name.removeprefix("sm_")): name for name in unit.architectures}
    same = [number for number in numbers if number // 10 == capability[0] and number <= wanted]
    if same:
        return numbers[max(same)]
    with_ptx = {kernel.architecture for kernel in unit.kernels if kernel.ptx}
    older = [number for number, name in numbers.items() if name in with_ptx and number <= wanted]
    if older:
        return numbers[max(older)]
    target = f"cuda:sm_{_compiled_for(capability)}"
    raise TargetError(
        "cuda.architecture",
        "No kernel of this artifact runs on this GPU.",
        f"The GPU is sm_{wanted}, and the artifact was compiled for {', '.join(unit.architectures)}.",
        f"Make others with `llmc retarget ARTIFACT -o OUT --target {target}`, without the model, or compile "
        f"the model with --target {target}.",
    )


def _compiled_for(capability: tuple[int, int]) -> int:
    """The architecture to compile for so that such a GPU runs the kernels: the newest of its generation that
    it has, else the one whose PTX comes along."""
    known = [int(name.removeprefix("sm_")) for name in CUDA_ARCHITECTURES]
    wanted = capability[0] * 10 + capability[1]
    same = [number for number in known if number // 10 == capability[0] and number <= wanted]
    return max(same, default=known[0])


class CudaKernels:
    """A `kernels.cuda.launch.Launcher` over compiled kernels.

    `stream()` gives the handle that launches go to. With `overlaps`, kernels that can begin before the launch
    ahead of them has ended. Nothing is compiled, but PTX by the driver while loading, of which the log says
    so; `origin` names the architecture, and whether it was compiled. Raises TargetError where no kernels are
    for the GPU, and where the driver is too old for those that are.
    """

    def __init__(
        self,
        artifact: Artifact,
        unit: CudaUnit,
        capability: tuple[int, int],
        driver: CudaDriver,
        stream: Callable[[], int],
        *,
        overlaps: bool = False,
    ) -> None:
        self.architecture = choose_architecture(unit, capability)
        is_native = int(self.architecture.removeprefix("sm_")) // 10 == capability[0]
        self._driver = driver
        self._stream = stream
        self._overlaps = overlaps
        # Making a key takes longer than a launch.
        self._keys: dict[Specialisation, str] = {}
        self._kernels = {k.key: k for k in unit.kernels if k.architecture == self.architecture}
        newest = max((k.toolkit for k in self._kernels.values()), key=_numbers)
        driver.require(newest, compiles=not is_native)
        self.origin = self.architecture
        if not is_native:
            self.origin += ", compiled by the driver from PTX"
            _tell(capability, self.architecture, len(self._kernels))
        self.functions = {
            key: load_kernel(driver, kernel, artifact.read_bytes(kernel.file if is_native else kernel.ptx))
            for key, kernel in self._kernels.items()
        }

    def __call__(self, launch: Launch) -> None:
        """Enqueue it. Raises InternalError for a kernel that the artifact does not have."""
        if 0 in launch.grid:
            return
        kernel = self._kernel(launch.specialisation)
        parameters = [parameter_value(name, kind, launch.values[name]) for name, kind in kernel.parameters]
        overlaps = self._overlaps and kernel.overlaps
        function = self.functions[kernel.key]
        self._driver.launch(function, launch.grid, self._stream(), parameters, overlaps=overlaps)

    def pack(self, specialisations: Sequence[Specialisation]) -> LaunchTable:
        """Launches of these, ready. Raises InternalError for a kernel that the artifact does not have."""
        kernels = [self._kernel(each) for each in specialisations]
        ready = [
            Ready(self.functions[each.key], len(each.parameters), self._overlaps and each.overlaps)
            for each in kernels
        ]
        return LaunchTable(self._driver, ready)

    def _kernel(self, specialisation: Specialisation) -> CudaKernel:
        key = self._keys.get(specialisation)
        if key is None:
            key = self._keys.setdefault(specialisation, specialisation.key)
        if key not in self._kernels:
            raise InternalError(
                "cuda.kernel_missing",
                f"A step needs kernel {specialisation.kernel!r} in a form that was not compiled.",
                f"It is {specialisation}.",
                "Report this with the model; kernels are never compiled while serving.",
            )
        return self._kernels[key]


def _tell(capability: tuple[int, int], architecture: str, count: int) -> None:
    """Say that loading is a compilation, and how not to have it."""
    own = _compiled_for(capability)
    wanted = capability[0] * 10 + capability[1]
    fix = "llmc compiles no machine code for its generation."
    if own // 10 == capability[0]:
        fix = f"`llmc retarget ARTIFACT -o OUT --target cuda:sm_{own}` makes kernels for it."
    logging.getLogger("llmc.runtime").warning(
        "The artifact has no machine code for this GPU (sm_%d): its driver compiles %d kernels from the PTX "
        "of %s while loading, and keeps what it made for the next start. %s",
        *(wanted, count, architecture, fix),
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def load_kernel(driver: CudaDriver, kernel: CudaKernel, code: bytes) -> Function:
    """The kernel from its code, held to what its launches pass."""
    sizes = [_size(kind) for _, kind in kernel.parameters] + [8, 8]
    return driver.load(code, kernel.name, warps=kernel.warps, shared_bytes=kernel.shared_bytes, sizes=sizes)


def _size(kind: str) -> int:
    return ctypes.sizeof(_SCALARS.get(kind, ctypes.c_void_p))


def parameter_value(name: str, kind: str, value: Any) -> Any:
    """A value as ctypes passes it. Raises InternalError for a tensor that is not aligned."""
    if kind in _SCALARS:
        return _SCALARS[kind](value)
    address = value.data_ptr()
    if address % _ALIGNMENT:
        raise InternalError(
            "cuda.alignment",
            f"Parameter {name!r} of a kernel lies at an address that is no multiple of {_ALIGNMENT}.",
            "Kernels were compiled for aligned tensors and would read elsewhere.",
            "Report this with the model.",
        )
    return ctypes.c_void_p(address)
