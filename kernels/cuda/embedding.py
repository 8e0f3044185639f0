"""Table look-ups: rows of an embedding, plain or stored as codes."""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl

from .words import word_codes


@triton.jit
def embedding(ids_ptr, table_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """`out[t] = table[ids[t]]`. Grid (tokens, ceil(WIDTH / BLOCK)); table and out are dense rows
    `[WIDTH]`."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    row = tl.load(ids_ptr + token).to(tl.int64)
    tl.store(
        out_ptr + token * WIDTH + column, tl.load(table_ptr + row * WIDTH + column, mask=inside), mask=inside
    )


@triton.jit
def code_embedding(
    ids_ptr,
    codes_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    WIDTH: tl.constexpr,
    STORED: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows of a table of codes, `(code - zero) * scale` in float32, rounded to the dtype of `out`.

    Grid (tokens, ceil(WIDTH / BLOCK)). Codes are `[V, STORED]`: int8, or words (`kernels.cuda.words`) for
    fewer bits; scales and zeros are `[V, GROUPS]`.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    row = tl.load(ids_ptr + token).to(tl.int64)
    if BITS == 8:
        code = tl.load(codes_ptr + row * STORED + column, mask=inside, other=0).to(tl.float32)
    else:
        code = word_codes(codes_ptr + row * STORED, column, inside).to(tl.float32)
        if SYMMETRIC:
            code = code - (1 << (BITS - 1))
    if not SYMMETRIC:
        code = code - tl.load(zeros_ptr + row * GROUPS + column // GROUP, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scales_ptr + row * GROUPS + column // GROUP, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * WIDTH + column, (code * scale).to(out_ptr.dtype.element_ty), mask=inside)
