"""Norm and rotary embedding of queries and keys, and the write into the paged cache, one program a token and
head."""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl

from .normalize import scaled
from .overlap import NOT_EARLY, follow
from .rounding import coded_row


@triton.jit
def load_normed(x_ptr, norm_ptr, inverse, offset, column, inside, NORM: tl.constexpr):
    """Elements `column[n]` of a head, or of its RMS norm of style `NORM`, of which `inverse` is one over the
    root; in x's dtype, 0 where not `inside`."""
    x = tl.load(x_ptr + column, mask=inside, other=0.0)
    if NORM == "":
        return x
    else:
        weight = tl.load(norm_ptr + column, mask=inside, other=0.0)
        wide = x.to(tl.float32) * inverse
        return scaled(wide, x, weight, offset, NORM == "cast_then_scale").to(x.dtype)


@triton.jit
def turned_head(
    x_ptr, norm_ptr, inv_freq_ptr, position, scale, eps, offset, column, D: tl.constexpr, R: tl.constexpr,
    FIRST: tl.constexpr, STYLE: tl.constexpr, NORM: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """A head `[D]` after its RMS norm and `llmc.rope` in its dtype: `R` elements from `FIRST` on turn, others
    stay. Gathers two elements of x for each result, both from one cache line or two."""
    inverse = 1.0
    if NORM != "":
        x = tl.load(x_ptr + column, mask=column < D, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / D + eps)
    own = load_normed(x_ptr, norm_ptr, inverse, offset, column, column < D, NORM)
    if TURNS:
        within = column - FIRST
        turns = (within >= 0) & (within < R)
        half: tl.constexpr = R // 2
        if STYLE == "interleaved":
            pair = within // 2
            is_second = within % 2 == 1
        else:
            is_second = within >= half
            pair = tl.where(is_second, within - half, within)
        if STYLE == "half":
            first = FIRST + pair
            second = first + half
        else:
            first = FIRST + 2 * pair
            second = first + 1
        a = load_normed(x_ptr, norm_ptr, inverse, offset, first, turns, NORM).to(tl.float32)
        b = load_normed(x_ptr, norm_ptr, inverse, offset, second, turns, NORM).to(tl.float32)
        frequency = tl.load(inv_freq_ptr + pair, mask=turns, other=0.0).to(tl.float32)
        angle = position.to(tl.float32) * frequency
        cosine = tl.cos(angle) * scale
        sine = tl.sin(angle) * scale
        turned = tl.where(is_second, b * cosine + a * sine, a * cosine - b * sine)
        own = tl.where(turns, turned.to(own.dtype), own)
    return own


@triton.jit
def store_head(x, cache_ptr, scales_ptr, place, column, WIDTH: tl.constexpr, CODES: tl.constexpr):
    """Writes a head of `WIDTH` values at `place` of a cache: as values, or as `CODES` with their scale."""
    inside = column < WIDTH
    target = cache_ptr + place * WIDTH + column
    if CODES == "":
        tl.store(target, x.to(cache_ptr.dtype.element_ty), mask=inside)
    else:
        coded = coded_row(x.to(tl.float32), CODES)
        tl.store(target, coded[0], mask=inside)
        tl.store(scales_ptr + place, coded[1])


@triton.jit
def rope_kv_write(
    q_ptr, k_ptr, v_ptr, q_norm_ptr, k_norm_ptr, positions_ptr, inv_freq_ptr, scale, eps, offset, q_out_ptr,
    k_cache_ptr, v_cache_ptr, slots_ptr, k_scales_ptr, v_scales_ptr, q_stride: tl.constexpr,
    k_stride: tl.constexpr, v_stride: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, R: tl.constexpr, FIRST: tl.constexpr, STYLE: tl.constexpr,
    NORM: tl.constexpr, TURNS: tl.constexpr, CODES: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr = NOT_EARLY,
):  # fmt: skip
    """`llmc.rope`, `llmc.kv_write` and `llmc.rope_kv_write` in one. Grid (tokens, HEADS + 2 * KV_HEADS).

    Programs of a token: first its `HEADS` queries, rotated to dense `q_out[T, HEADS, D]`, then keys, rotated
    if `TURNS`, then values, both to slot `slots[t]` of caches `[slots, KV_HEADS, D or V]`, nothing at a
    negative slot; `CODES` (int8, fp8) have scales `[slots, KV_HEADS]`. `NORM` is the style of the RMS norm of
    each query and key before, by weights `q_norm[D]` and `k_norm[D]`. Strides are in elements between tokens;
    heads are dense.
    """
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    position = token
    if TURNS:
        position = tl.load(positions_ptr + token)
    if head < HEADS:
        source = q_ptr + token * q_stride + head * D
        turned = turned_head(
            *(source, q_norm_ptr, inv_freq_ptr, position, scale, eps, offset, column),
            *(D, R, FIRST, STYLE, NORM, TURNS),
        )
        tl.store(q_out_ptr + (token * HEADS + head) * D + column, turned, mask=column < D)
    elif KV_HEADS > 0:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if slot >= 0:
            if head < HEADS + KV_HEADS:
                group = head - HEADS
                source = k_ptr + token * k_stride + group * D
                turned = turned_head(
                    *(source, k_norm_ptr, inv_freq_ptr, position, scale, eps, offset, column),
                    *(D, R, FIRST, STYLE, NORM, TURNS),
                )
                store_head(turned, k_cache_ptr, k_scales_ptr, slot * KV_HEADS + group, column, D, CODES)
            else:
                group = head - HEADS - KV_HEADS
                x = tl.load(v_ptr + token * v_stride + group * V + column, mask=column < V, other=0.0)
                store_head(x, v_cache_ptr, v_scales_ptr, slot * KV_HEADS + group, column, V, CODES)
