"""Instructions a weight in the hot loops, from the disassembly: a regression of speed that needs no GPU.

An H200 issues some 31 T lane-instructions a second; at 4.3 TB/s that leaves 3.5 a 4-bit weight, 7 a byte, 14
a bfloat16.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile

import pytest
import torch

from llmc.codegen.cuda.assemble import assemble
from llmc.kernels.cuda.operators import CudaOperators

pytest.importorskip("triton")
N, K = 4096, 4096


def specialisation_of(work):
    """The one specialisation that `work` launches."""
    found = []
    work(CudaOperators(lambda launch: found.append(launch.specialisation)))
    return found[0]


def words(group, n=N):
    x = torch.empty(1, K, dtype=torch.bfloat16)
    codes = torch.empty(n, K // 8, dtype=torch.int32)
    scales = torch.empty(n, K // group, dtype=torch.float16)
    return specialisation_of(
        lambda operators: operators.quantized_linear(x, codes, scales, None, None, f"int4_g{group}")
    )


def dense():
    x, weight = torch.empty(1, K, dtype=torch.bfloat16), torch.empty(N, K, dtype=torch.bfloat16)
    return specialisation_of(lambda operators: operators.linear(x, weight, None))


def code_bytes():
    x = torch.empty(1, K, dtype=torch.bfloat16)
    codes, scales = torch.empty(N, K, dtype=torch.int8), torch.empty(N, K // 32, dtype=torch.float16)
    return specialisation_of(
        lambda operators: operators.quantized_linear(x, codes, scales, None, None, "int8_g32")
    )


def disassembler():
    code = "from triton import knobs; print(knobs.nvidia.nvdisasm.path)"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def loop_length(cubin):
    """Instructions of the longest backward jump: the body of the loop over K."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [disassembler(), "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    labels, jumps, count = {}, [], 0
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x?_?\w+):", line):
            labels[label[1]] = count
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            if instruction[1].startswith("BRA") and (target := re.search(r"(\.L_x?_?\w+)", instruction[2])):
                jumps.append((count, target[1]))
            count += 1
    return max(at - labels[target] + 1 for at, target in jumps if labels.get(target, count) <= at)


@pytest.mark.parametrize(
    ("make", "weights_a_loop", "most"),
    [
        # four blocks of 128 a turn of the loop
        (lambda: words(128), 512, 3.4),
        (lambda: words(128, n=28672), 512, 3.2),
        (lambda: words(32), 512, 4.6),
        (dense, 128, 2.2),
        (code_bytes, 32, 12.5),
    ],
    ids=["int4_g128", "int4_g128_wide", "int4_g32", "bf16", "int8_g32"],
)
def test_instructions_a_weight(make, weights_a_loop, most):
    specialisation = make()
    constants = dict(specialisation.constants)
    (machine,) = assemble([(specialisation, "sm_90")])
    weights = constants["BN"] * weights_a_loop / machine.warps / 32
    found = loop_length(machine.cubin) / weights
    print(specialisation.kernel, "instructions a weight:", found, "registers:", machine.registers)
    assert found <= most
    assert machine.stack_bytes == 0
