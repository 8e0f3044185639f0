"""Codes of at most 4 bits in 32-bit words, as matrix kernels read them.

A row is padded to blocks of 128 codes. In each, word j of 16 holds code k = 32 * i + 2 * j + h at bit 4 * i +
16 * h: one shift and one three-input logic operation turn a word into two neighbouring codes as bfloat16.
"""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl

_LESS = (
    "{{ .reg .b16 low, high; .reg .b32 both, less; mov.b32 {{low, high}}, $2; mov.b32 both, {{{0}, {0}}}; "
)
_LESS += "mov.b32 less, 0xBF80BF80; fma.rn.bf16x2 $0, both, less, $1; }}"
LESS_LOW, LESS_HIGH = tl.constexpr(_LESS.format("low")), tl.constexpr(_LESS.format("high"))


@triton.jit
def word_codes(words_ptr, column, inside):
    """The codes 0 … 15 at `column[n]` of one row of words, int32; 0 where not `inside`."""
    within = column % 128
    pair = within % 32
    word = tl.load(words_ptr + column // 128 * 16 + pair // 2, mask=inside, other=0)
    return (word >> (4 * (within // 32) + 16 * (pair % 2))) & 0xF


@triton.jit
def word_pairs(words, ones, lifts, DIGIT: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr):
    """`code - zero` as bfloat16 `[ROWS, 32]`, for digit `DIGIT` of `words[ROWS, 16]`; `ones` is
    `exponents(…)`, and half `HALF` of each of `lifts[ROWS, 1]` the row's zero, `lifted`.

    0x4300 is 128 in bfloat16, whose last 7 bits then count in ones (after Kim et al. 2022, "Who says
    elephants can't run"): both terms of the difference, and itself, are exact.
    """
    pair = halves(pairs_less(((words >> (4 * DIGIT)) & 0x000F000F) | ones, lifts, HALF))
    return tl.join(pair[0], pair[1]).reshape(ROWS, 32)


@triton.jit
def pairs_less(pairs, lifts, HALF: tl.constexpr):
    """Both bfloat16 halves of `pairs` less one half of `lifts`, all in int32: one instruction, where the
    compiler would take halves apart and put them together again."""
    return tl.inline_asm_elementwise(
        LESS_HIGH if HALF else LESS_LOW,  # pyright: ignore[reportArgumentType]
        "=r,r,r",
        [pairs, lifts],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def word_digits(
    words, ones, lifts, FIRST: tl.constexpr, DIGITS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr
):
    """`word_pairs` of 1, 2 or 4 digits from `FIRST` on, one behind the other: `[ROWS, 32 * DIGITS]`."""
    values = word_pairs(words, ones, lifts, FIRST, HALF, ROWS)
    if DIGITS >= 2:
        values = beside(values, word_pairs(words, ones, lifts, FIRST + 1, HALF, ROWS), ROWS, 32)
    if DIGITS == 4:
        third = word_pairs(words, ones, lifts, FIRST + 2, HALF, ROWS)
        fourth = word_pairs(words, ones, lifts, FIRST + 3, HALF, ROWS)
        values = beside(values, beside(third, fourth, ROWS, 32), ROWS, 64)
    return values


@triton.jit
def beside(left, right, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """`[ROWS, 2 * WIDTH]` of two tensors `[ROWS, WIDTH]`."""
    return tl.reshape(tl.permute(tl.join(left, right), [0, 2, 1]), [ROWS, 2 * WIDTH])


@triton.jit
def exponents(M):
    """0x43004300, which depends on the number of rows as far as the compiler knows: in a register, and not
    part of an instruction, one logic operation takes it together with a mask."""
    return tl.where(M >= 0, 0x43004300, 0)


@triton.jit
def lifted(codes, ones):
    """`128 + code` as bfloat16 in the halves of int32, of codes below 128 there; `ones` is `exponents(…)`."""
    return (codes & 0x00FF00FF) | ones


@triton.jit
def scale_of_digits(quad, DIGIT: tl.constexpr, DIGITS: tl.constexpr, TYPE: tl.constexpr):
    """The scale of digits from `DIGIT` on, of 16 bits, from those of a block one behind the other."""
    return (quad >> (16 * DIGIT // DIGITS)).to(tl.uint16).to(TYPE, bitcast=True)


@triton.jit
def byte_values_of_words(words, ones, FORM: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """The values of one-byte codes (int8 or e4m3, `FORM`) as bfloat16 `[ROWS, 4 * WORDS]`, from int32
    `words[ROWS, WORDS]` of four neighbours each; exactly, by integer operations on two at a time. `ones` is
    `exponents(…)`."""
    even = byte_pair(words & 0x00FF00FF, ones, FORM)
    odd = byte_pair((words >> 8) & 0x00FF00FF, ones, FORM)
    first = tl.join(even[0], even[1])
    second = tl.join(odd[0], odd[1])
    return tl.join(first, second).reshape(ROWS, 4 * WORDS)


@triton.jit
def byte_pair(both, ones, FORM: tl.constexpr):
    """The codes in the two halves of each of `both` as bfloat16."""
    low = both & 0x007F007F
    sign = both & 0x00800080
    if FORM == "int8":
        # 128 plus the low bits, less 128 or 256: 0x4300 and 0x4380.
        values = halves(low | ones)
        lifts = halves(sign | ones)
        return values[0] - lifts[0], values[1] - lifts[1]
    else:
        # e4m3's fields where bfloat16 has its own, whose exponent's bias is 120 higher.
        values = halves((sign << 8) | (low << 4))
        bias = tl.full([1, 1], 1.329227995784916e36, tl.bfloat16)
        return values[0] * bias, values[1] * bias


@triton.jit
def halves(both):
    """Low and high half of 32 bits as bfloat16."""
    low = both.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return low, (both >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
