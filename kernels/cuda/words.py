"""Codes of at most 4 bits in 32-bit words, as matrix kernels read them.

A row is padded to blocks of 128 codes. In each, word j of 16 holds code k = 32 * i + 2 * j + h at bit 4 * i +
16 * h: one shift and one three-input logic operation turn a word into two neighbouring codes as bfloat16.
"""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def word_codes(words_ptr, column, inside):
    """The codes 0 … 15 at `column[n]` of one row of words, int32; 0 where not `inside`."""
    within = column % 128
    pair = within % 32
    word = tl.load(words_ptr + column // 128 * 16 + pair // 2, mask=inside, other=0)
    return (word >> (4 * (within // 32) + 16 * (pair % 2))) & 0xF


@triton.jit
def word_pairs(words, DIGIT: tl.constexpr, ROWS: tl.constexpr):
    """`128 + code` as bfloat16 `[ROWS, 32]`, for digit `DIGIT` of `words[ROWS, 16]`.

    0x4300 is 128 in bfloat16, whose last 7 bits then count in ones (after Kim et al. 2022, "Who says
    elephants can't run").
    """
    both = ((words >> (4 * DIGIT)) & 0x000F000F) | 0x43004300
    low = both.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (both >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high).reshape(ROWS, 32)
