"""Single kernels against the device's limits: products over the bytes of their weight, attention over those
of the cache."""

from __future__ import annotations

import torch
from device import DEVICE, seconds_of
from torch._subclasses.fake_tensor import FakeTensorMode

from llmc.kernels.cuda.launch import Specialisation
from llmc.kernels.cuda.operators import CudaOperators

# Matrices [N, K] of Llama-3.1-8B, and its head.
MATRICES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "head": (128256, 4096),
}
ROWS = (1, 8, 16, 64, 512, 2048)
# (batch, context) of attention, over pages of `PAGE` tokens.
CONTEXTS = ((1, 1024), (1, 8192), (8, 1024), (8, 8192), (64, 1024), (1, 65536))
PAGE = 64
_ROTATE_BYTES = 512 << 20


def weight_of(form: str, n: int, k: int) -> tuple:
    """Random stored tensors of one matrix, and the operator's arguments behind x."""
    if form == "bf16":
        return (torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16), None)
    scheme, _, activation = form.partition("+")
    if scheme.endswith("_channel"):
        codes = (torch.randn(n, k, device=DEVICE) * 40).clamp(-127, 127)
        codes = codes.to(torch.int8 if scheme.startswith("int8") else torch.float8_e4m3fn)
        return (codes, torch.rand(n, 1, device=DEVICE), None, None, scheme, activation, None)
    bits, group = (8, 32) if form == "int8_g32" else (4, int(form.removeprefix("int4_g")))
    scales = torch.rand(n, k // group, device=DEVICE).half()
    if bits == 8:
        codes = torch.randint(-127, 127, (n, k), device=DEVICE, dtype=torch.int8)
    else:
        codes = torch.randint(-(2**31), 2**31 - 1, (n, 16 * (-(-k // 128))), device=DEVICE, dtype=torch.int32)
    return (codes, scales, None, None, form)


def product_rates(operators: CudaOperators, form: str) -> dict:
    """GB/s of weight bytes and TFLOP/s by matrix and rows; copies rotate so that no cache flatters."""
    operators.launch.prepare(specialisations_of(form))
    found: dict = {}
    for name, (n, k) in MATRICES.items():
        first = weight_of(form, n, k)
        size = sum(part.nbytes for part in first if isinstance(part, torch.Tensor))
        copies = [first, *(weight_of(form, n, k) for _ in range(min(8, _ROTATE_BYTES // size)))]
        for rows in ROWS:
            x = torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16)
            work = lambda: [operators.product(x, copy, None, "", None) for copy in copies]  # noqa: B023, E731
            seconds = seconds_of(work) / len(copies)
            flops = 2 * rows * n * k / seconds / 1e12
            rate = {"us": seconds * 1e6, "gb_s": size / seconds / 1e9, "tflop_s": flops}
            if form == "bf16":  # what the numeric contract costs against a library that may change its sums
                theirs = seconds_of(lambda: [x @ weight.T for weight, _ in copies])  # noqa: B023
                rate["library_us"] = theirs / len(copies) * 1e6
            found[f"{name} m{rows}"] = rate
    return found


def specialisations_of(form: str) -> list[Specialisation]:
    """What `product_rates` launches."""
    found: list[Specialisation] = []
    operators = CudaOperators(lambda launch: found.append(launch.specialisation))
    with FakeTensorMode():
        for n, k in MATRICES.values():
            weight = weight_of(form, n, k)
            for rows in ROWS:
                x = torch.empty(rows, k, device=DEVICE, dtype=torch.bfloat16)
                operators.product(x, weight, None, "", None)
    return found


def attention_rates(operators: CudaOperators) -> dict:
    """Decode of Llama-3.1-8B's attention: GB/s over the bytes of K and V, beside torch's own over dense
    tensors."""
    heads, groups, width, page = 32, 8, 128, PAGE
    found: dict = {}
    for batch, context in CONTEXTS:
        per_sequence = context // page
        pages = batch * per_sequence
        k, v = (
            torch.randn(pages, page, groups, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)
        )
        table = torch.randperm(pages, device=DEVICE).reshape(batch, per_sequence)
        q = torch.randn(batch, heads, width, device=DEVICE, dtype=torch.bfloat16)
        starts = torch.arange(batch + 1, device=DEVICE)
        positions = torch.full((batch,), context - 1, device=DEVICE)
        case = (q, k, v, q.new_empty(0), table, starts, positions, None, width**-0.5, 0, 0.0, 0)
        seconds = seconds_of(lambda: operators.paged_attention(*case))  # noqa: B023
        dense = [
            t[table.reshape(-1)].reshape(batch, context, groups, width).transpose(1, 2).contiguous()
            for t in (k, v)
        ]
        attend = torch.nn.functional.scaled_dot_product_attention
        theirs = seconds_of(lambda: attend(q[:, :, None], *dense, enable_gqa=True))  # noqa: B023
        size = k.nbytes + v.nbytes
        found[f"b{batch} ctx{context}"] = {
            "us": seconds * 1e6,
            "gb_s": size / seconds / 1e9,
            "torch_gb_s": size / theirs / 1e9,
        }
    return found
