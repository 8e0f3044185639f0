"""Codes of fewer than 8 bits as the words that CUDA kernels read (see `kernels.cuda.words`), and back."""

# pyright: basic

from __future__ import annotations

from typing import Any

_BLOCK_BYTES = 64


def pack_words(codes: Any) -> Any:
    """Words int32 `[N, 16 * ceil(Kp / 128)]` of portable codes uint8 `[N, Kp / 2]` (even column in the low
    nibble).

    Argument and result are torch tensors; what fills the last block is zero.
    """
    rows, width = codes.shape
    num_blocks = -(-width // _BLOCK_BYTES)
    padded = codes.new_zeros((rows, num_blocks * _BLOCK_BYTES))
    padded[:, :width] = codes
    # [rows, block, digit, word]
    pairs = padded.int().reshape(rows, num_blocks, 4, 16)
    low, high = (
        half[:, :, 0] | half[:, :, 1] << 4 | half[:, :, 2] << 8 | half[:, :, 3] << 12
        for half in (pairs & 0xF, pairs >> 4)
    )
    return (low | high << 16).reshape(rows, -1)


def unpack_words(words: Any, width: int) -> Any:
    """Inverse of `pack_words` for codes of `width` bytes a row."""
    rows = words.shape[0]
    grouped = words.reshape(rows, -1, 1, 16)
    pairs = grouped.new_empty((rows, grouped.shape[1], 4, 16))
    for digit in range(4):
        low, high = grouped >> (4 * digit), grouped >> (4 * digit + 16)
        pairs[:, :, digit : digit + 1] = (low & 0xF) | ((high & 0xF) << 4)
    return pairs.reshape(rows, -1)[:, :width].byte()
