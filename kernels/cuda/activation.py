"""Activations of gated feed-forward blocks, elementwise over rows."""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl

from .overlap import NOT_EARLY, follow


@triton.jit
def tanh(x):
    """Hyperbolic tangent of float32 values, exact at both ends."""
    shrunk = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activation called `NAME` in `ir.ops.activation`, of float32 values."""
    if NAME == "silu":
        return x / (1.0 + tl.exp(-x))
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == "relu":
        return tl.maximum(x, 0.0)
    elif NAME == "relu2":
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif NAME == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        tl.static_assert(NAME == "identity", "an activation without a kernel")
        return x


@triton.jit
def gated_activation(
    gate_ptr,
    up_ptr,
    out_ptr,
    gate_stride: tl.constexpr,
    up_stride: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr = NOT_EARLY,
):
    """`activation(gate) * up` of rows `[WIDTH]`, both steps rounded to the dtype of `gate` and `out`.

    Grid (rows, ceil(WIDTH / BLOCK)). Strides are in elements between rows; `out` is dense.
    """
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0)
    active = activate(gate.to(tl.float32), ACTIVATION).to(gate.dtype)
    out = (active.to(tl.float32) * up.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * WIDTH + column, out, mask=inside)
