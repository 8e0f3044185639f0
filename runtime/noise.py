"""Logarithm, exponential and Gumbel noise from IEEE operations alone, so that any language gives the same
bits. Everything is float64, round to nearest even, no fused multiply-add, in exactly the written order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .philox import token_bits

Float64s = NDArray[np.float64]

# ln 2 in two parts: the high one ends in 21 zero bits, so its product with an exponent is exact.
LN2_HIGH = float.fromhex("0x1.62e42feep-1")
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
LOG2_E = float.fromhex("0x1.71547652b82fep+0")
# log: 1 / (2 k + 1), k = 10 ... 0; exp: 1 / k!, k = 13 ... 0. Each the nearest float64, highest power first.
LOG_COEFFICIENTS = tuple(1.0 / (2 * k + 1) for k in range(10, -1, -1))
_FACTORIALS = (
    6227020800,
    479001600,
    39916800,
    3628800,
    362880,
    40320,
    5040,
    720,
    120,
    24,
    6,
    2,
    1,
    1,
)
EXP_COEFFICIENTS = tuple(1.0 / factorial for factorial in _FACTORIALS)
# Noise lies within these bounds, so a token further than their difference below the best cannot win.
MAX_NOISE = 22.9
MIN_NOISE = -3.2

_MANTISSA = np.uint64(0x000FFFFFFFFFFFFF)
_ONE = np.uint64(0x3FF0000000000000)
_SQRT_2 = float.fromhex("0x1.6a09e667f3bcdp+0")


def log(values: Float64s) -> Float64s:
    """Natural logarithm of positive normal float64 values; within 4 ulp.

    x = m 2^e with m in (sqrt(1/2), sqrt(2)]: take m in [1, 2) and, where m > sqrt(2), halve it and add
    one to e. s = (m - 1) / (m + 1), t = s s, p = Horner(LOG_COEFFICIENTS, t), and
    log x = e LN2_HIGH + ((s + s) p + e LN2_LOW).
    """
    bits = values.view(np.uint64)
    exponent = (bits >> np.uint64(52)).astype(np.int64) - 1023
    mantissa = ((bits & _MANTISSA) | _ONE).view(np.float64)
    high = mantissa > _SQRT_2
    mantissa = np.where(high, mantissa * 0.5, mantissa)
    power = (exponent + high).astype(np.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    t = s * s
    series = np.full_like(t, LOG_COEFFICIENTS[0])
    for coefficient in LOG_COEFFICIENTS[1:]:
        series = series * t + coefficient
    return power * LN2_HIGH + ((s + s) * series + power * LN2_LOW)


def exp(values: Float64s) -> Float64s:
    """e to the power of values <= 0; 0 below -700.

    k = round-half-even(x LOG2_E), r = (x - k LN2_HIGH) - k LN2_LOW, Horner(EXP_COEFFICIENTS, r) 2^k.
    """
    clamped = np.maximum(values, -700.0)
    power = np.rint(clamped * LOG2_E)
    r = (clamped - power * LN2_HIGH) - power * LN2_LOW
    series = np.full_like(r, EXP_COEFFICIENTS[0])
    for coefficient in EXP_COEFFICIENTS[1:]:
        series = series * r + coefficient
    return np.where(values < -700.0, 0.0, np.ldexp(series, power.astype(np.int64)))


def gumbel(seed: int, position: int, token_ids: NDArray[np.int64]) -> Float64s:
    """Standard Gumbel noise of each vocabulary index: u = (bits + 0.5) 2^-32, then -log(-log(u)).

    32 bits are not cut to fewer: the smallest -log(u) must stay below the probabilities of rare tokens.
    """
    uniform = (token_bits(seed, position, token_ids).astype(np.float64) + 0.5) * 2.0**-32
    return -log(-log(uniform))
