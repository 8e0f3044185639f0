"""A CUDA artifact made without a GPU: its kernels compute what the program says (interpreted), its cubins
load and take what launches pass (a stub driver), files hold nothing of the machine that made them."""

from __future__ import annotations

import ctypes
import logging
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmc.artifact.cuda import CUDA_UNIT, decode_unit
from llmc.artifact.oracle import read_oracle
from llmc.codegen.base import backend_for
from llmc.codegen.cuda.assemble import assemble, kernel_of
from llmc.codegen.cuda.cubin import check_parameters, parameter_layout
from llmc.kernels.cuda.launch import launch_of
from llmc.runtime.config import RuntimeConfig
from llmc.runtime.oracle import oracle_problems
from llmc.spec.errors import InternalError, TargetError
from llmc.spec.target import CUDA_ARCHITECTURES, parse_target

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def artifact(cuda_artifact):
    return cuda_artifact


@pytest.fixture(scope="module")
def unit(artifact):
    return decode_unit(artifact.read_bytes(CUDA_UNIT))


def test_interpreted_kernels_reproduce_the_oracle(artifact):
    from llmc.kernels.cuda.interpreter import correct_interpreter
    from llmc.kernels.cuda.jit import launch_jit
    from llmc.runtime.executors.cuda import Machine, make_executor
    from llmc.runtime.executors.cuda_device import Device

    correct_interpreter()
    oracle = read_oracle(artifact)
    config = RuntimeConfig(max_requests=4, max_step_tokens=64, max_model_len=128)
    machine = Machine(
        device=Device("cpu"), launcher=launch_jit, recorder=None, free_bytes=1 << 30, details={}
    )
    executor = make_executor(artifact, config, machine)
    short = replace(oracle, prompts=oracle.prompts[:1])
    assert oracle_problems(executor, short) == []
    executor.close()


def test_memory_that_another_process_took_meanwhile_is_an_error_that_says_so(artifact, monkeypatch):
    from llmc.runtime.executors.cuda import Machine, make_executor
    from llmc.runtime.executors.cuda_device import Device

    def taken(self, name):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.\nMore.")

    monkeypatch.setattr("llmc.ir.weights.WeightStore.evaluate", taken)
    machine = Machine(device=Device("cpu"), launcher=print, recorder=None, free_bytes=1 << 30, details={})
    config = RuntimeConfig(max_requests=4, max_step_tokens=64, max_model_len=128)
    with pytest.raises(TargetError, match=r"took memory meanwhile. CUDA out of memory. Tried"):
        make_executor(artifact, config, machine)


def test_files_name_no_path_and_registers_do_not_spill_much(artifact, unit):
    assert unit.architectures == ("sm_90",)
    for kernel in unit.kernels:
        cubin = artifact.read_bytes(kernel.file)
        assert str(HERE.parents[1]).encode() not in cubin
        assert b".py" not in cubin
        # Reducing the angles of a rotation takes an array of the library's.
        assert kernel.stack_bytes <= 32, kernel
        assert kernel.shared_bytes <= 227 << 10, kernel


def test_stored_words_give_the_programs_codes_back(artifact, unit):
    stored = backend_for(artifact.manifest.target).stored_weights(artifact)
    assert unit.words
    word = unit.words[0]
    assert word.stored in stored
    assert stored[word.codes].shape == (word.rows, word.width)
    assert stored[word.codes].dtype == torch.uint8


def example(width=64):
    values = {"ids_ptr": torch.zeros(3, dtype=torch.int64), "table_ptr": torch.zeros(9, width)}
    values["out_ptr"] = torch.zeros(3, width)
    return launch_of("embedding.embedding", (3, 1), values, {"WIDTH": width, "BLOCK": 64})


def test_the_same_kernel_is_the_same_bytes_for_every_architecture():
    wanted = [(example().specialisation, name) for name in CUDA_ARCHITECTURES] * 2
    machines = assemble(wanted)
    count = len(CUDA_ARCHITECTURES)
    assert [m.cubin for m in machines[:count]] == [m.cubin for m in machines[count:]]
    assert len({m.cubin for m in machines}) == count


def test_what_was_compiled_once_is_not_compiled_again():
    kept, computed = {}, []

    def recall(inputs, label, compute):
        if inputs not in kept:
            computed.append(label)
            kept[inputs] = compute()
        return kept[inputs]

    wanted = [(example().specialisation, "sm_90"), (example(32).specialisation, "sm_90")]
    first = assemble(wanted, recall)
    assert computed == ["embedding.embedding for sm_90"] * 2
    assert assemble(wanted, recall) == first
    assert len(computed) == 2
    assert assemble(wanted[1:]) == first[1:]


def test_parameters_are_checked_against_the_file(artifact, unit):
    kernel = unit.kernels[0]
    cubin, types = artifact.read_bytes(kernel.file), [kind for _, kind in kernel.parameters]
    check_parameters(cubin, kernel.name, types)
    assert len(parameter_layout(cubin, kernel.name)) == len(types) + 2
    with pytest.raises(InternalError, match="takes other parameters"):
        check_parameters(cubin, kernel.name, types[1:])
    with pytest.raises(InternalError, match="no ELF file"):
        check_parameters(b"not a cubin", kernel.name, types)


@pytest.fixture(scope="module")
def stub(cuda_stub):
    return cuda_stub[0]


def test_every_kernel_loads_and_takes_what_a_launch_passes(artifact, unit, cuda_stub, monkeypatch):
    from llmc.runtime.executors.cuda_driver import CudaDriver
    from llmc.runtime.executors.cuda_kernels import CudaKernels

    stub, log = cuda_stub
    log.write_text("")
    driver = CudaDriver(str(stub))
    kernels = CudaKernels(artifact, unit, (9, 0), driver, lambda: 0xABC0)
    asked = [k for k in unit.kernels if k.shared_bytes > 48 << 10]
    assert log.read_text().count("attribute") == len(asked)
    kernel = next(k for k in unit.kernels if k.file.startswith("kernels/normalize"))
    tensors = {name: torch.zeros(8) for name, kind in kernel.parameters if kind.startswith("*")}
    numbers = {name: 2.0 for name, kind in kernel.parameters if kind == "fp32"}
    launch = example()
    known = replace(launch.specialisation, kernel="normalize.normalize")
    monkeypatch.setattr(type(known), "key", property(lambda self: kernel.key))
    kernels(replace(launch, specialisation=known, grid=(7, 1, 1), values=tensors | numbers))
    fields = log.read_text().splitlines()[-1].split()
    assert fields[:3] == ["launch", kernel.name, "7,1,1"]
    assert fields[3:6] == [str(32 * kernel.warps), str(kernel.shared_bytes), "0xabc0"]
    pointers = [str(value.data_ptr()) for value in tensors.values()]
    two = str(ctypes.c_int32.from_buffer(ctypes.c_float(2.0)).value)
    expected = [pointers.pop(0) if kind.startswith("*") else two for _, kind in kernel.parameters]
    assert fields[6:] == [*expected, "0", "0"]


def test_what_the_driver_refuses_is_an_error_that_says_so(stub, artifact, unit):
    from llmc.runtime.executors.cuda_driver import CudaDriver

    kernel = unit.kernels[0]
    cubin = artifact.read_bytes(kernel.file)
    driver = CudaDriver(str(stub))
    with pytest.raises(TargetError, match="image is invalid"):
        driver.load(b"broken", kernel.name, warps=4, shared_bytes=0, sizes=[])
    with pytest.raises(TargetError, match="symbol not found"):
        driver.load(cubin, "another", warps=4, shared_bytes=0, sizes=[])
    with pytest.raises(TargetError, match="a launch passes"):
        driver.load(cubin, kernel.name, warps=4, shared_bytes=0, sizes=[8])
    with pytest.raises(TargetError, match="bytes of shared memory"):
        driver.load(cubin, kernel.name, warps=4, shared_bytes=1 << 20, sizes=[])
    with pytest.raises(TargetError, match="cannot be loaded"):
        CudaDriver("libcuda-of-nobody.so.1")


def test_an_artifact_for_other_gpus_says_what_to_do(unit):
    from llmc.runtime.executors.cuda_kernels import choose_architecture

    assert choose_architecture(unit, (9, 0)) == "sm_90"
    retargeted = "the artifact was compiled for sm_90.*llmc retarget ARTIFACT -o OUT --target cuda:"
    # The GPU's own, the newest of its generation that it runs, or the one whose PTX any newer driver takes.
    for capability, name in (((8, 9), "sm_89"), ((8, 6), "sm_80"), ((12, 0), "sm_80")):
        with pytest.raises(TargetError) as raised:
            choose_architecture(unit, capability)
        assert re.search(retargeted + name, str(raised.value), re.DOTALL)
    older = replace(unit, kernels=(replace(unit.kernels[0], architecture="sm_80", ptx="kernels/x.ptx"),))
    assert choose_architecture(older, (8, 6)) == "sm_80"
    assert choose_architecture(older, (10, 0)) == "sm_80"


@pytest.fixture(scope="module")
def portable(artifact, unit):
    """Three of the artifact's kernels for sm_80 alone, with their PTX: a product, a softmax and a sampler."""
    from stub_executor import specialisations_of

    known = specialisations_of(artifact).values()
    names = ("linear.linear_words", "attention.merge_splits", "sampling.draw")
    chosen = [next(each for each in known if each.kernel == name) for name in names]
    files, kernels = {}, []
    for each, machine in zip(chosen, assemble([(each, "sm_80") for each in chosen]), strict=True):
        files |= {f"{each.key}.cubin": machine.cubin, f"{each.key}.ptx": machine.ptx}
        kernels.append(kernel_of(each, "sm_80", machine, f"{each.key}.cubin", f"{each.key}.ptx"))
    return replace(unit, kernels=tuple(kernels)), SimpleNamespace(read_bytes=files.__getitem__)


def test_a_newer_gpu_is_given_ptx_and_the_user_is_told(portable, cuda_stub, caplog, monkeypatch):
    from llmc.runtime.executors.cuda_driver import CudaDriver
    from llmc.runtime.executors.cuda_kernels import CudaKernels

    monkeypatch.setattr(logging.getLogger("llmc"), "propagate", True)
    unit, files = portable
    library, log = cuda_stub

    def loaded(capability):
        log.write_text("")
        caplog.clear()
        kernels = CudaKernels(files, unit, capability, CudaDriver(str(library)), lambda: 0)
        assert len(kernels.functions) == 3
        return kernels.origin, log.read_text().count("compile"), caplog.text

    assert loaded((8, 6)) == ("sm_80", 0, "")
    origin, compiled, told = loaded((9, 0))
    assert (origin, compiled) == ("sm_80, compiled by the driver from PTX", 3)
    assert re.search(r"no machine code for this GPU \(sm_90\): its driver compiles 3 kernels.*sm_80", told)
    assert "--target cuda:sm_90` makes kernels for it" in told
    assert "compiles no machine code for its generation" in loaded((12, 0))[2]


def test_a_driver_that_does_not_know_the_ptx_is_too_old(portable, cuda_stub):
    from llmc.runtime.executors.cuda_driver import CudaDriver
    from llmc.runtime.executors.cuda_kernels import CudaKernels

    unit, files = portable
    library = ctypes.CDLL(str(cuda_stub[0]))
    needed = max(tuple(map(int, kernel.toolkit.split(".")[:2])) for kernel in unit.kernels)
    dotted = ".".join(map(str, needed))

    def load(capability):
        return CudaKernels(files, unit, capability, CudaDriver(str(cuda_stub[0])), lambda: 0)

    try:
        library.llmc_stub_driver(1000 * needed[0])
        assert load((8, 0)).origin == "sm_80"  # machine code of the same generation
        with pytest.raises(TargetError, match=f"whose PTX it would.*Install a driver for CUDA {dotted}"):
            load((9, 0))
        with pytest.raises(TargetError, match="code 222: the provided PTX was compiled"):
            CudaDriver(str(cuda_stub[0])).load(
                files.read_bytes(unit.kernels[0].ptx), "any", warps=4, shared_bytes=0, sizes=[]
            )
    finally:
        library.llmc_stub_driver(12080)


def test_a_driver_that_compiles_ptx_cannot_fuse_what_must_stay_apart(portable):
    """Fused multiply-add is off in machine code; PTX has to say so itself, by rounding each result."""
    unit, files = portable
    for kernel in unit.kernels:
        text = files.read_bytes(kernel.ptx).decode()
        assert re.search(r"\bmul\.rn\.f(32|64)", text), kernel.name
        assert not re.search(r"\b(add|sub|mul)(\.ftz)?\.f(32|64)\b", text), kernel.name


def test_targets_are_parsed():
    assert parse_target("cuda:sm_90, sm_80").levels == ("sm_90", "sm_80")
    with pytest.raises(TargetError, match="no GPU architecture 'sm_13'"):
        parse_target("cuda:sm_13")
