"""Corrections to triton's interpreter, so that kernels run without a GPU and give right answers.

For tests and traces: `TRITON_INTERPRET=1` must be set before triton is imported.
"""

# pyright: basic

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as _interpreter

from .words import LESS_HIGH, LESS_LOW

interpreter: Any = _interpreter

# Element type -> torch's, and integers of its width that carry its bits through numpy.
_TYPES = {
    tl.bfloat16: (torch.bfloat16, torch.int16, np.int16),
    tl.float16: (torch.float16, torch.int16, np.int16),
    tl.float32: (torch.float32, torch.int32, np.int32),
    tl.float64: (torch.float64, torch.int64, np.int64),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, np.uint8),
    tl.float8e5: (torch.float8_e5m2, torch.uint8, np.uint8),
}
_SMALL = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
# The GPU's conversions saturate at the largest finite value.
_LIMITS = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}


def correct_interpreter() -> None:
    """Replace what triton 3.6 gets wrong: small floats are computed as their bit patterns, casts truncate,
    `dot` of bfloat16 multiplies bits, `fma` rounds twice, a loop bound is not taken as an index by numpy 2.4,
    and there is no assembly (of which kernels have `words.pairs_less` alone). Idempotent."""
    builder: Any = interpreter.InterpreterBuilder
    if builder.create_dot is _dot:
        return
    plain = _Plain(interpreter._convert_float, builder.cast_impl, builder.binary_op, builder.unary_op)
    patch_tensor = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch_with_index
    interpreter._convert_float = plain.convert
    builder.create_dot = _dot
    builder.create_fma = _fma
    builder.create_inline_asm = _pairs_less
    builder.cast_impl = lambda self, value, kind: plain.cast(self, value, kind)
    builder.binary_op = lambda self, a, b, operation: plain.binary(self, a, b, operation)
    builder.unary_op = lambda self, a, operation: plain.unary(self, a, operation)
    builder.get_bf16 = lambda self, value: _handle(
        _convert(np.array([value], np.float32), tl.float32, tl.bfloat16)
    )


def _handle(array: Any, kind: Any = tl.bfloat16) -> Any:
    return interpreter.TensorHandle(array, kind)


def _convert(array: Any, source: Any, target: Any) -> Any:
    """Bits of `array` as `source` to bits as `target`, rounded to nearest even, saturating where the GPU
    does."""
    torch_source, _, bits_source = _TYPES[source]
    torch_target, bits_target, _ = _TYPES[target]
    value = torch.from_numpy(np.ascontiguousarray(array).view(bits_source).copy()).view(torch_source)
    value = value.double() if tl.float64 in (source, target) else value.float()
    if target in _LIMITS:
        value = torch.where(value.isnan(), value, value.clamp(-_LIMITS[target], _LIMITS[target]))
    bits = value.to(torch_target).contiguous().view(bits_target).numpy()
    return bits.view(f"uint{target.primitive_bitwidth}").reshape(np.shape(array))


def _float32(handle: Any) -> Any:
    kind = handle.dtype.scalar
    return _convert(handle.data, kind, tl.float32).view(np.float32) if kind in _SMALL else handle.data


def _dot(self: Any, a: Any, b: Any, sums: Any, *_: Any) -> Any:
    """Products of the exact operands, summed in float32 or int32."""
    wide = np.float32 if a.dtype.scalar.is_floating() else np.int32
    product = np.matmul(_float32(a).astype(wide), _float32(b).astype(wide))
    return interpreter.TensorHandle((product + sums.data).astype(sums.data.dtype), sums.dtype.scalar)


def _fma(self: Any, a: Any, b: Any, c: Any) -> Any:
    """Of float32: the product is exact in float64, in which the sum is rounded before it is to float32."""
    wide = a.data.astype(np.float64) * b.data + c.data
    return interpreter.TensorHandle(wide.astype(np.float32), tl.float32)


def _pairs_less(self: Any, text: str, constraints: str, values: Any, *_: Any) -> Any:
    """What the texts `words.LESS_LOW` and `words.LESS_HIGH` say, of bfloat16 in the halves of int32."""
    half = {LESS_LOW.value: 0, LESS_HIGH.value: 16}[text]
    pairs, lifts = (value.data.astype(np.uint32) for value in values)
    lift = ((lifts >> half) << 16).view(np.float32)
    found = []
    for bits in (pairs << 16, pairs & 0xFFFF0000):
        found.append(_convert(bits.view(np.float32) - lift, tl.float32, tl.bfloat16).astype(np.uint32))
    both = interpreter.TensorHandle((found[0] | found[1] << 16).view(np.int32), tl.int32)
    return SimpleNamespace(get_result=lambda index: both)


class _Plain:
    """What the interpreter did before, and with small floats widened around it."""

    def __init__(self, convert: Any, cast: Any, binary: Any, unary: Any) -> None:
        self._convert = convert
        self._cast = cast
        self._binary = binary
        self._unary = unary

    def convert(self, array: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source in _TYPES and target in _TYPES:
            return _convert(array, source, target)
        return self._convert(array, source, target, rounding)

    def cast(self, builder: Any, value: Any, kind: Any) -> Any:
        source, target = value.dtype.scalar, kind.scalar
        if source in _TYPES and target in _TYPES and source != target:
            bits = _convert(value.data, source, target)
            return interpreter.TensorHandle(bits.view(interpreter._get_np_dtype(target)), target)
        if source is tl.bfloat16 and target.is_int():
            value = interpreter.TensorHandle(_float32(value), tl.float32)
        if target is tl.bfloat16 and source.is_int():
            wide = interpreter.TensorHandle(value.data.astype(np.float32), tl.float32)
            return self.cast(builder, wide, kind)
        return self._cast(builder, value, kind)

    def binary(self, builder: Any, a: Any, b: Any, operation: Any) -> Any:
        kind = a.dtype.scalar
        if kind not in _SMALL:
            return self._binary(builder, a, b, operation)
        return _narrow(self._binary(builder, _wide(a), _wide(b), operation), kind)

    def unary(self, builder: Any, a: Any, operation: Any) -> Any:
        kind = a.dtype.scalar
        if kind not in _SMALL:
            return self._unary(builder, a, operation)
        return _narrow(self._unary(builder, _wide(a), operation), kind)


def _wide(handle: Any) -> Any:
    return interpreter.TensorHandle(_float32(handle), tl.float32)


def _narrow(handle: Any, kind: Any) -> Any:
    if handle.data.dtype == np.bool_:
        return handle
    bits = _convert(handle.data.astype(np.float32), tl.float32, kind)
    return interpreter.TensorHandle(bits.view(interpreter._get_np_dtype(kind)), kind)
