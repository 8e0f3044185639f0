"""One kernel through triton's compiler. Runs in processes that do nothing else."""

# pyright: basic

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import replace

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from ...kernels.cuda.jit import kernel_function
from ...kernels.cuda.launch import Specialisation
from ...spec.errors import InternalError
from .assemble import Machine
from .cubin import check_parameters

# Of a block at most (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
SHARED_BYTES = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
# Of tensor memory, from sm_100 on (PTX ISA, "Tensor Memory").
TENSOR_COLUMNS = 512
# Constants of kernels that are the architecture's, not a specialisation's, and the first that has what they
# ask for: launches that begin early, products of e4m3.
FEATURES = {"PDL": 90, "E4M3": 89}


def compile_one(wanted: tuple[Specialisation, str]) -> Machine:
    """Machine code of a specialisation for an architecture, its parameters checked."""
    specialisation, architecture = wanted
    overlaps = _features(kernel_function(specialisation.kernel), architecture).get("PDL", False)
    compiled, stages = _fitting(specialisation, architecture)
    cubin = compiled.asm["cubin"]
    metadata = compiled.metadata
    check_parameters(cubin, metadata.name, [kind for _, kind in specialisation.parameters])
    registers, stack_bytes = _resources(cubin)
    return Machine(
        cubin=cubin,
        ptx=compiled.asm["ptx"].encode(),
        name=metadata.name,
        warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        registers=registers,
        stack_bytes=stack_bytes,
        stages=stages,
        toolkit=get_ptxas(int(architecture.removeprefix("sm_"))).version,
        overlaps=overlaps,
    )


def _fitting(specialisation: Specialisation, architecture: str) -> tuple[triton.compiler.CompiledKernel, int]:
    """Compiled with as many loads ahead as were asked for, or as shared memory holds, and how many those are;
    it changes no bit."""
    most, stages = SHARED_BYTES[architecture], specialisation.stages
    compiled = _compile(specialisation, architecture)
    while compiled.metadata.shared > most and stages > 1:
        stages -= 1
        compiled = _compile(replace(specialisation, stages=stages), architecture)
    if (getattr(compiled.metadata, "tmem_size", None) or 0) > TENSOR_COLUMNS:
        # triton's own launcher refuses such code, which does nothing but trap.
        raise InternalError(
            "cuda.tensor_memory",
            f"Kernel {specialisation.kernel!r} does not fit into the tensor memory of {architecture}.",
            f"It takes {compiled.metadata.tmem_size} columns of {TENSOR_COLUMNS}.",
            "Report this with the model.",
        )
    if compiled.metadata.shared > most:
        raise InternalError(
            "cuda.shared_memory",
            f"Kernel {specialisation.kernel!r} does not fit into the shared memory of {architecture}.",
            f"It takes {compiled.metadata.shared} bytes of {most}.",
            "Report this with the model.",
        )
    return compiled, stages


def _features(function: triton.JITFunction, architecture: str) -> dict[str, bool]:
    """Which of what a kernel can use an architecture has."""
    number = int(architecture.removeprefix("sm_"))
    return {name: number >= first for name, first in FEATURES.items() if name in function.arg_names}


def _compile(specialisation: Specialisation, architecture: str) -> triton.compiler.CompiledKernel:
    function = kernel_function(specialisation.kernel)
    types = dict(specialisation.types)
    constants = dict(specialisation.constants) | {
        name: None for name, kind in types.items() if kind == "none"
    }
    constants |= _features(function, architecture)
    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    aligned = [["tt.divisibility", 16]]
    hints = {(i,): aligned for i, name in enumerate(function.arg_names) if signature[name].startswith("*")}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=hints)
    options = {
        "num_warps": specialisation.warps,
        "num_stages": specialisation.stages,
        # A multiplication and an addition that become one change bits, and not in every kernel alike.
        "enable_fp_fusion": False,
    }
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    try:
        return triton.compile(source, target=target, options=options)
    except Exception as error:
        reason = [type(error).__name__, *str(error).strip().splitlines()][-1]
        raise InternalError(
            "cuda.kernel",
            f"Kernel {specialisation.kernel!r} does not compile for {architecture}.",
            f"triton says: {reason}.",
            "Report this with the model and the version of triton.",
        ) from error


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise InternalError(
            "cuda.resources",
            "A compiled kernel does not say what it uses.",
            "cuobjdump, which comes with triton, printed no registers.",
            "Report this with the version of triton.",
        )
    return int(found[1]), int(found[2])
