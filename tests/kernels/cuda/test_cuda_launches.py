"""What operators launch: a kernel's parameters in the kernel's own order, which is how a driver takes them,
all of its constants, and code for every architecture."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

from llmc.codegen.cuda.assemble import assemble
from llmc.kernels.cuda.operators import CudaOperators
from llmc.kernels.cuda.sampler import DeviceSampler, Samples, make_space, make_tables
from llmc.spec.target import CUDA_ARCHITECTURES

pytest.importorskip("triton")
BF16 = torch.bfloat16


def launched(work):
    found = []
    work(CudaOperators(found.append))
    return found


def products(operators):
    x = torch.empty(3, 128, dtype=BF16)
    scales = torch.empty(64, 4)
    words, codes = torch.empty(64, 16, dtype=torch.int32), torch.empty(64, 128, dtype=torch.int8)
    zeros = torch.empty(64, 4, dtype=torch.uint8)
    operators.linear(x, torch.empty(64, 128, dtype=BF16), None)
    operators.quantized_linear(x, words, scales, zeros, None, "int4_g32_asym")
    operators.quantized_linear(x, codes, scales, None, None, "int8_g32")
    operators.quantized_linear(x, codes, scales[:, :1], None, None, "int8_channel", "int8_token")


def mixture(operators):
    x, ids = torch.empty(3, 64, dtype=BF16), torch.zeros(3, 2, dtype=torch.int64)
    weights = torch.empty(4, 64, 64, dtype=BF16), torch.empty(4, 64, 32, dtype=BF16)
    operators.moe(x, ids, torch.empty(3, 2), *weights, None, None, "silu", False, 0.0, 0.0)


def attention(operators):
    q, cache = torch.empty(2, 4, 32, dtype=BF16), torch.empty(3, 16, 2, 32, dtype=BF16)
    kv, slots = torch.empty(2, 2, 32, dtype=BF16), torch.zeros(2, dtype=torch.int64)
    angles = (slots, torch.empty(16), 1.0, "half", False)
    operators.rope_kv_write(q, kv, kv, *angles, cache, cache, slots)
    weight = torch.empty(32, dtype=BF16)
    norms = (weight, weight, 1e-6, 0.0, "cast_then_scale")
    operators.normed_rope_kv_write(q, kv, kv, norms, *angles, cache, cache, slots)
    table = torch.zeros(2, 3, dtype=torch.int64)
    for starts in (torch.arange(3), torch.tensor([0, 2])):
        operators.paged_attention(q, cache, cache, q, table, starts, slots, None, 1.0, 0, 0.0, 0)


def coded_attention(operators):
    q, kv = torch.empty(2, 4, 64, dtype=BF16), torch.empty(2, 2, 64, dtype=BF16)
    slots, scales = torch.zeros(2, dtype=torch.int64), torch.empty(3, 16, 2)
    angles = (slots, torch.empty(32), 1.0, "half", False)
    table = torch.zeros(2, 3, dtype=torch.int64)
    for form in (torch.int8, torch.float8_e4m3fn):
        cache = torch.empty(3, 16, 2, 64, dtype=form)
        operators.rope_kv_write(q, kv, kv, *angles, cache, cache, slots, scales, scales)
        for starts in (torch.arange(3), torch.tensor([0, 2])):
            settings = (starts, slots, None, 1.0, 0, 0.0, 0, scales, scales)
            operators.paged_attention(q, cache, cache, q, table, *settings)


def step(operators):
    empty = lambda shape, dtype: torch.empty(shape, dtype=getattr(torch, dtype))  # noqa: E731
    sampler = DeviceSampler(operators.launch)
    tables, space = make_tables(empty, 4, 5000, (9,)), make_space(empty, 2, 5000)
    row, ids = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    samples = Samples(
        row_of=row, ahead=row, drafts=row, mask_of=row, masks=tables.banned, first=row, count=row
    )
    results = torch.zeros(2, 4, dtype=torch.int32)
    for filtered in (False, True):
        sampler.sample(torch.empty(2, 5000), samples, tables, space, results, filtered=filtered)
    sampler.open_step((row, row, row), tables, ids, ids, [(torch.zeros(2, 9, dtype=torch.int64), ids, 64)])
    sampler.change_pages(torch.zeros(1, 3, dtype=torch.int32), tables.tables[0])
    sampler.fill_ids(ids, row, tables.state)


WORK = [products, mixture, attention, coded_attention, step]


@pytest.mark.parametrize("work", WORK)
def test_launches_name_parameters_in_order(work):
    from llmc.codegen.cuda.worker import FEATURES
    from llmc.kernels.cuda.jit import kernel_function

    for launch in launched(work):
        specialisation = launch.specialisation
        names = [n for n in kernel_function(specialisation.kernel).arg_names if n not in FEATURES]
        runtime = [name for name, _ in specialisation.types]
        constants = [name for name, _ in specialisation.constants]
        assert runtime == [name for name in names if name in runtime], specialisation.kernel
        assert sorted([*runtime, *constants]) == sorted(names), specialisation.kernel


def test_a_single_row_takes_the_kernels_that_a_walk_without_data_found():
    from torch._subclasses.fake_tensor import FakeTensorMode

    def work(operators):
        packed = torch.empty(1, 256, dtype=BF16)
        q, k, v = packed.split([128, 64, 64], 1)
        q, k, v = q.reshape(-1, 2, 64), k.reshape(-1, 1, 64), v.reshape(-1, 1, 64)
        cache, slots = torch.empty(3, 16, 1, 64, dtype=BF16), torch.zeros(1, dtype=torch.int64)
        operators.rope_kv_write(q, k, v, slots, torch.empty(32), 1.0, "half", False, cache, cache, slots)
        table, starts = torch.zeros(1, 3, dtype=torch.int64), torch.arange(2)
        operators.paged_attention(q, cache, cache, q, table, starts, slots, None, 1.0, 0, 0.0, 0)
        operators.linear(packed[:, :128], torch.empty(64, 128, dtype=BF16), None)

    with FakeTensorMode():
        walked = [launch.specialisation.key for launch in launched(work)]
    assert [launch.specialisation.key for launch in launched(work)] == walked


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CUDA_ARCHITECTURES)
def test_kernels_compile_for_every_architecture_and_none_spills(architecture):
    from llmc.codegen.cuda.worker import SHARED_BYTES

    wanted = {each.specialisation: None for work in WORK for each in launched(work)}
    machines = assemble([(specialisation, architecture) for specialisation in wanted])
    for specialisation, machine in zip(wanted, machines, strict=True):
        # Reducing the angles of a rotation takes an array of the library's. Anything more would be a spill.
        most = 32 if "rope" in specialisation.kernel else 0
        assert machine.stack_bytes <= most, specialisation
        assert machine.shared_bytes <= SHARED_BYTES[architecture], specialisation


def wide_attention(width, shared, form):
    """Over one token a sequence and over several: what attention launches, merging aside."""

    def work(operators):
        q, cache = torch.empty(2, 2 * shared, width, dtype=BF16), torch.empty(3, 64, 2, width, dtype=form)
        scales = () if form == BF16 else (torch.empty(3, 64, 2),) * 2
        table, slots = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        for starts in (torch.arange(3), torch.tensor([0, 2])):
            settings = (table, starts, slots, None, 1.0, 0, 0.0, 0, *scales)
            operators.paged_attention(q, cache, cache, q, *settings)

    found = [launch.specialisation for launch in launched(work)]
    return [each for each in found if each.kernel != "attention.merge_splits"]


_LAYOUTS = """
import json, pickle, re, sys
from llmc.codegen.cuda.worker import _compile

texts = [_compile(*each).asm["ttgir"] for each in pickle.load(sys.stdin.buffer)]
print(json.dumps([sorted(re.findall("#mma[0-9]* = (.*)", text)) for text in texts]))
"""


@pytest.mark.slow
def test_attention_of_one_token_and_of_many_uses_the_same_instructions_and_order():
    """The layout of matrix instructions says which they are, and how warps divide the keys of a sum."""
    cases = [(64, 4, BF16), (128, 8, torch.int8), (128, 1, BF16), (256, 2, BF16)]
    wanted = [
        (each, name)
        for name in ("sm_80", "sm_90", "sm_100")
        for case in cases
        for each in wide_attention(*case)
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _LAYOUTS]
    done = subprocess.run(
        command, input=pickle.dumps(wanted), capture_output=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 2 * 3 * len(cases)
    for one, many in zip(found[::2], found[1::2], strict=True):
        assert one
        assert one == many


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CUDA_ARCHITECTURES)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_attention_of_wide_heads_fits(architecture, width):
    wanted = [
        each
        for form, shared in ((BF16, 1), (BF16, 8), (torch.int8, 4))
        for each in wide_attention(width, shared, form)
    ]
    machines = assemble([(each, architecture) for each in wanted])
    for specialisation, machine in zip(wanted, machines, strict=True):
        # What is there is kept between splits of 1024 keys, outside the loop over them.
        most = 64 if width <= 128 else 160
        assert machine.stack_bytes <= most, (specialisation, machine.stack_bytes)
