"""Instructions a weight in the hot loops, from the disassembly: a regression of speed that needs no GPU.

An H200 issues some 31 T lane-instructions a second; at 4.3 TB/s that leaves 3.5 a 4-bit weight, 7 a byte, 14
a bfloat16.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from dataclasses import replace

import pytest
import torch

from llmc.codegen.cuda.assemble import assemble
from llmc.kernels.cuda.operators import CudaOperators
from llmc.kernels.cuda.variants import modelled
from llmc.spec.errors import InternalError
from llmc.spec.target import CUDA_ARCHITECTURES

pytest.importorskip("triton")
N, K = 4096, 4096


def specialisation_of(weight, n, k, norm=False, gate="", residual=False, rows=1, choose=modelled):
    """The product that `rows` rows launch."""
    found = []
    x, factor = torch.empty(rows, k, dtype=torch.bfloat16), torch.empty(k, dtype=torch.bfloat16)
    operators = CudaOperators(lambda launch: found.append(launch.specialisation), choose=choose)
    added = torch.empty(rows, n, dtype=torch.bfloat16) if residual else None
    operators.product(x, weight, (factor, 1e-5, 0.0, "cast_then_scale") if norm else None, gate, added)
    return found[-1]


def words(group, n=N, k=K, zeros=False, choose=modelled, **around):
    codes = torch.empty(n, k // 8, dtype=torch.int32)
    scales = torch.empty(n, k // group, dtype=torch.float16)
    points = torch.empty(n, k // group, dtype=torch.uint8) if zeros else None
    scheme = f"int4_g{group}" + "_asym" * zeros
    return specialisation_of((codes, scales, points, None, scheme), n, k, choose=choose, **around)


def dense(**around):
    return specialisation_of((torch.empty(N, K, dtype=torch.bfloat16), None), N, K, **around)


def code_bytes(scheme, groups, activation="", **around):
    dtype = torch.int8 if scheme.startswith("int8") else torch.float8_e4m3fn
    codes, scales = torch.empty(N, K, dtype=dtype), torch.empty(N, groups, dtype=torch.float16)
    return specialisation_of((codes, scales, None, None, scheme, activation, None), N, K, **around)


def disassembler():
    code = "from triton import knobs; print(knobs.nvidia.nvdisasm.path)"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def disassembled(cubin):
    """The machine code as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [disassembler(), "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def num_instructions(cubin):
    return len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s", disassembled(cubin), re.MULTILINE))


def loop_length(cubin):
    """Instructions of the longest backward jump: the body of the loop over K."""
    text = disassembled(cubin)
    labels, jumps, count = {}, [], 0
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x?_?\w+):", line):
            labels[label[1]] = count
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            if instruction[1].startswith("BRA") and (target := re.search(r"(\.L_x?_?\w+)", instruction[2])):
                jumps.append((count, target[1]))
            count += 1
    return max(at - labels[target] + 1 for at, target in jumps if labels.get(target, count) <= at)


CASES = {
    # four blocks of 128 a turn of the loop
    "int4_g128": (lambda: words(128), 512, 2.6),
    "int4_g128_normed": (lambda: words(128, 6144, norm=True), 512, 2.8),
    "int4_g128_normed_gate": (lambda: words(128, 28672, norm=True, gate="silu"), 512, 2.8),
    # of a 1B model
    "int4_g128_1b": (lambda: words(128, 2048, 8192), 512, 2.6),
    "int4_g128_1b_normed_gate": (lambda: words(128, 16384, 2048, norm=True, gate="silu"), 512, 2.8),
    "int4_g128_zeros": (lambda: words(128, zeros=True), 512, 2.8),
    "int4_g64_zeros": (lambda: words(64, zeros=True), 512, 3.0),
    "int4_g32": (lambda: words(32), 512, 3.2),
    "int4_g32_normed": (lambda: words(32, 6144, norm=True), 512, 3.2),
    "int4_g32_normed_gate": (lambda: words(32, 28672, norm=True, gate="silu"), 512, 3.2),
    # seven blocks, of fourteen
    "int4_g32_residual": (lambda: words(32, 4096, 14336, residual=True), 896, 3.2),
    "int4_g32_1b": (lambda: words(32, 2048, 8192, residual=True), 512, 3.2),
    "int4_g32_1b_normed_gate": (lambda: words(32, 16384, 2048, norm=True, gate="silu"), 512, 3.2),
    "int4_g32_zeros": (lambda: words(32, zeros=True), 512, 3.2),
    "int4_g32_zeros_normed_gate": (lambda: words(32, 28672, zeros=True, norm=True, gate="silu"), 512, 3.5),
    "bf16": (dense, 128, 2.2),
    "bf16_normed": (lambda: dense(norm=True), 128, 3.0),
    "int8_g32": (lambda: code_bytes("int8_g32", K // 32), 128, 6.0),
    "int8_g32_normed": (lambda: code_bytes("int8_g32", K // 32, norm=True), 128, 6.2),
    "int8_g128": (lambda: code_bytes("int8_g128", K // 128), 128, 5.2),
    "int8": (lambda: code_bytes("int8_channel", 1), 128, 6.0),
    "fp8": (lambda: code_bytes("fp8_channel", 1), 128, 6.0),
    "fp8_by_fp8": (lambda: code_bytes("fp8_channel", 1, "fp8_token"), 128, 1.5),
}
FAST = ("int4_g128",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in CASES]
)
def test_instructions_a_weight(name):
    make, weights_a_loop, most = CASES[name]
    specialisation = make()
    constants = dict(specialisation.constants)
    (machine,) = assemble([(specialisation, "sm_90")])
    weights = constants["BN"] * weights_a_loop / machine.warps / 32
    found = loop_length(machine.cubin) / weights
    print(specialisation.kernel, "instructions a weight:", found, "registers:", machine.registers)
    assert found <= most
    assert machine.stack_bytes == 0
    assert machine.overlaps


def most_columns(product):
    """The variant of 128 columns, which tuning tries."""
    return replace(modelled(product), columns=128)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("around", "most"),
    [
        ({"n": 9728, "norm": True, "gate": "silu"}, 3.35),
        ({"n": 1152, "norm": True, "choose": most_columns}, 3.35),
        ({"n": 896, "residual": True, "choose": most_columns}, 3.2),
        # Programs of 64 columns share loads and barriers of a group among half as many weights.
        ({"n": 1152, "norm": True}, 4.1),
        ({"n": 896, "residual": True}, 3.6),
    ],
)
def test_instructions_a_weight_of_a_row_that_is_one_turn(around, most):
    """Of a 0.5B model's K there is no loop: what four more blocks add to three is counted, loads twice: those
    ahead of the turn, and those for a turn that does not follow."""
    found = [words(32, k=k, **around) for k in (384, 896)]
    assert {dict(each.constants)["UNROLL"] for each in found} == {3, 7}
    short, long = assemble([(each, "sm_90") for each in found])
    weights = dict(found[0].constants)["BN"] * 512 / long.warps / 32
    more = (num_instructions(long.cubin) - num_instructions(short.cubin)) / weights
    print(around, "instructions a weight:", more)
    assert more <= most
    assert short.stack_bytes == long.stack_bytes == 0


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CUDA_ARCHITECTURES)
def test_threads_share_the_norm_of_a_short_row(architecture):
    """Each would take some 3800 instructions and all registers to make it alone."""
    wanted = [words(32, 1152, 896), words(32, 1152, 896, norm=True)]
    plain, normed = assemble([(each, architecture) for each in wanted])
    assert num_instructions(normed.cubin) - num_instructions(plain.cubin) <= 1000
    assert normed.stack_bytes == 0


@pytest.mark.slow
def test_e4m3_is_multiplied_as_itself_where_the_architecture_does():
    few, many = (code_bytes("fp8_channel", 1, "fp8_token", rows=rows) for rows in (1, 200))
    instructions = {"sm_80": "HMMA", "sm_89": "QMMA", "sm_90": "QGMMA", "sm_100": "UTCQMMA"}
    wanted = [(each, name) for name in instructions for each in (few, many)]
    for (_, name), machine in zip(wanted, assemble(wanted), strict=True):
        found = set(re.findall(r"\b[A-Z]*MMA\b", disassembled(machine.cubin)))
        assert found == {instructions[name]}, name
        assert machine.stack_bytes <= 8, name


@pytest.mark.slow
def test_a_kernel_waits_before_it_reads_where_the_hardware_can():
    """Machine code of sm_90 waits for the launches ahead of it, once and before its first load, and lets the
    next begin; that of sm_80 knows nothing of it."""
    specialisation = words(128)
    newer, older = assemble([(specialisation, "sm_90"), (specialisation, "sm_80")])
    assert not older.overlaps
    assert b"griddepcontrol" not in older.ptx
    text = newer.ptx.decode()
    wait = text.index("griddepcontrol.wait")
    assert text.count("griddepcontrol.wait") == 1
    assert wait < text.index("griddepcontrol.launch_dependents")
    assert wait < text.index("ld.global")
    # Parts of a tile are summed by the last to arrive, which sees what the others stored.
    assert "atom.global.gpu.acq_rel" in text or "atom.gpu.global.acq_rel" in text
    assert "acqbulk" in disassembled(newer.cubin).lower()


@pytest.mark.slow
def test_loads_ahead_are_as_many_as_an_architecture_holds():
    """Words of an 8B model take more shared memory than a block of sm_89 has, with four loads ahead."""
    specialisation = words(128)
    small, large = assemble([(specialisation, "sm_89"), (specialisation, "sm_90")])
    assert small.shared_bytes <= 99 << 10 < large.shared_bytes
    assert small.stack_bytes == 0


@pytest.mark.slow
def test_what_tensor_memory_does_not_hold_is_an_error():
    """triton would compile it to code that traps."""
    fits = words(32, 28672, rows=128)
    constants = tuple((name, 128 if name == "BM" else value) for name, value in fits.constants)
    assert constants != fits.constants
    with pytest.raises(InternalError, match="tensor memory of sm_100"):
        assemble([(replace(fits, constants=constants), "sm_100")])
