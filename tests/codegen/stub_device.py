"""An NVIDIA driver without a GPU for tests: the stub library, its launches carried out by triton's
interpreter on memory of the CPU, at the addresses that they were made with; torch's operators as its calls
of the host."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmc.kernels.cuda.jit import kernel_function

COMPILER = shutil.which("g++") or shutil.which("cc")
_POINTERS = {
    "*fp64": torch.float64,
    "*fp32": torch.float32,
    "*bf16": torch.bfloat16,
    "*fp16": torch.float16,
    "*fp8e4nv": torch.float8_e4m3fn,
    "*i64": torch.int64,
    "*i32": torch.int32,
    "*i8": torch.int8,
    "*u8": torch.uint8,
}
_EXECUTE = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint64), ctypes.c_int
)
_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def build_stub(folder):
    """The stub library, and the file that it writes launches to."""
    library = Path(folder) / "libcuda-stub.so"
    flags = ["-x", "c", "-shared", "-fPIC", "-Wall", "-Werror"]
    source = Path(__file__).parent / "cuda_stub.c"
    subprocess.run([COMPILER, *flags, str(source), "-o", str(library)], check=True)
    log = Path(folder) / "log"
    ctypes.CDLL(None).setenv(b"LLMC_CUDA_STUB_LOG", str(log).encode(), 1)
    return library, log


class Interpreted:
    """Carries out the launches that reach the stub. `specialisations` by key are what was compiled."""

    def __init__(self, library, specialisations):
        self._library = ctypes.CDLL(str(library))
        self._specialisations = specialisations
        self._known = {}
        self._callback = _EXECUTE(self._execute)
        self._library.llmc_stub_execute(self._callback)
        self._calls = []
        self.errors = []

    def know(self, kernels):
        """The functions of a `CudaKernels`."""
        for key, function in kernels.functions.items():
            self._known[function.handle.value] = self._specialisations[key]

    def fail_after(self, launches):
        """The driver reports an error at a launch, as for an illegal address."""
        self._library.llmc_stub_fail_after(launches)

    def pretend(self, version):
        """The driver is of that version, 12080 for CUDA 12.8."""
        self._library.llmc_stub_driver(version)

    def enqueued(self, work):
        """`work`, of which torch's operators are enqueued on the device, too, as they are on a real one."""

        def enqueue_all():
            with Enqueued(self._enqueue):
                work()

        return enqueue_all

    def close(self):
        self.pretend(12080)
        self._library.llmc_stub_execute(_EXECUTE())
        self.fail_after(-1)

    def _enqueue(self, carry_out):
        def call(_):
            try:
                carry_out()
            except BaseException as error:  # noqa: BLE001 - it must not go through the library's frames
                self.errors.append(error)

        self._calls.append(_CALL(call))
        assert self._library.cuLaunchHostFunc(None, self._calls[-1], None) == 0

    def _execute(self, handle, grid, values, count):
        try:
            specialisation = self._known[handle]
            assert count == len(specialisation.parameters) + 2
            passed = {name: None for name, kind in specialisation.types if kind == "none"}
            for index, (name, kind) in enumerate(specialisation.parameters):
                passed[name] = _value(kind, values[index])
            kernel_function(specialisation.kernel)[tuple(grid[:3])](
                **passed, **dict(specialisation.constants)
            )
        except BaseException as error:  # noqa: BLE001 - it must not go through the library's frames
            self.errors.append(error)


class Enqueued(TorchDispatchMode):
    """Gives `enqueue` what each operator would do to memory, and only makes the memory of its results."""

    def __init__(self, enqueue):
        super().__init__()
        self._enqueue = enqueue

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        returned = func._schema.returns
        assert len(returned) == 1, func
        if returned[0].alias_info is not None and returned[0].alias_info.is_write:
            target = kwargs.get("out", args[0])
            self._enqueue(lambda: func(*args, **kwargs))
            return target
        found = func(*args, **kwargs)
        if returned[0].alias_info is None:
            self._enqueue(lambda: found.copy_(func(*args, **kwargs)))
        return found


def _value(kind, word):
    if kind == "i32":
        return ctypes.c_int32(word & 0xFFFFFFFF).value
    if kind == "fp32":
        return struct.unpack("<f", struct.pack("<I", word & 0xFFFFFFFF))[0]
    # The interpreter takes a tensor's address alone: its length does not matter.
    memory = (ctypes.c_uint8 * 16).from_address(word)
    return torch.frombuffer(memory, dtype=_POINTERS[kind])
