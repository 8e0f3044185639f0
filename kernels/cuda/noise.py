"""Exponential, logarithm and Gumbel noise of the oracle sampler, bit for bit: `runtime.noise` and
`runtime.philox` say what they are, and in which order of IEEE operations."""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp_exact(x):
    """`runtime.noise.exp` of float64 values <= 0."""
    clamped = tl.maximum(x, -700.0)
    # Adding and taking away 1.5 * 2**52 rounds to an integer, half to even.
    power = (clamped * 1.4426950408889634 + 6755399441055744.0) - 6755399441055744.0
    r = (clamped - power * 0.6931471803691238) - power * 1.9082149292705877e-10
    series = tl.full(x.shape, 1.0 / 6227020800.0, tl.float64)
    series = series * r + (1.0 / 479001600.0)
    series = series * r + (1.0 / 39916800.0)
    series = series * r + (1.0 / 3628800.0)
    series = series * r + (1.0 / 362880.0)
    series = series * r + (1.0 / 40320.0)
    series = series * r + (1.0 / 5040.0)
    series = series * r + (1.0 / 720.0)
    series = series * r + (1.0 / 120.0)
    series = series * r + (1.0 / 24.0)
    series = series * r + (1.0 / 6.0)
    series = series * r + 0.5
    series = series * r + 1.0
    series = series * r + 1.0
    # 2**power, made of its exponent's bits: power is at least -1010, so that nothing is subnormal.
    lifted = ((power.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.where(x < -700.0, 0.0, series * lifted)


@triton.jit
def log_exact(x):
    """`runtime.noise.log` of positive normal float64 values."""
    bits = x.to(tl.int64, bitcast=True)
    mantissa = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    high = mantissa > 1.4142135623730951
    mantissa = tl.where(high, mantissa * 0.5, mantissa)
    power = ((bits >> 52) - 1023 + high.to(tl.int64)).to(tl.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    t = s * s
    series = tl.full(x.shape, 1.0 / 21.0, tl.float64)
    series = series * t + (1.0 / 19.0)
    series = series * t + (1.0 / 17.0)
    series = series * t + (1.0 / 15.0)
    series = series * t + (1.0 / 13.0)
    series = series * t + (1.0 / 11.0)
    series = series * t + (1.0 / 9.0)
    series = series * t + (1.0 / 7.0)
    series = series * t + 0.2
    series = series * t + (1.0 / 3.0)
    series = series * t + 1.0
    return power * 0.6931471803691238 + ((s + s) * series + power * 1.9082149292705877e-10)


@triton.jit
def philox_round(c0, c1, c2, c3, k0, k1):
    """One round of Philox4x32 over uint32 words."""
    product_0 = c0.to(tl.uint64) * 0xD2511F53
    product_1 = c2.to(tl.uint64) * 0xCD9E8D57
    high_0, low_0 = (product_0 >> 32).to(tl.uint32), product_0.to(tl.uint32)
    high_1, low_1 = (product_1 >> 32).to(tl.uint32), product_1.to(tl.uint32)
    return high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0


@triton.jit
def token_bits(seed, position, first_token, BLOCK: tl.constexpr):
    """`runtime.philox.token_bits` of tokens `first_token` … `first_token + BLOCK - 1`, uint32 `[BLOCK]`.

    `first_token` is a multiple of 4: four neighbours share one evaluation. `seed` is int64.
    """
    c0 = (first_token // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    c1 = tl.zeros_like(c0) + position.to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = c2 + (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = c2 + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):  # pyright: ignore[reportGeneralTypeIssues]
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
        k0 = ((k0.to(tl.uint64) + 0x9E3779B9) & 0xFFFFFFFF).to(tl.uint32)
        k1 = ((k1.to(tl.uint64) + 0xBB67AE85) & 0xFFFFFFFF).to(tl.uint32)
    return tl.join(tl.join(c0, c2), tl.join(c1, c3)).reshape(BLOCK)


@triton.jit
def gumbel(seed, position, first_token, BLOCK: tl.constexpr):
    """`runtime.noise.gumbel` of `BLOCK` neighbours, float64."""
    bits = token_bits(seed, position, first_token, BLOCK)
    uniform = (bits.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return -log_exact(-log_exact(uniform))
