"""The permanent row of a request on the device: one record of 64-bit words, and who may read what of it.
Knows neither triton nor tensors."""

from __future__ import annotations

import struct
from collections.abc import Mapping

# Word of each field in a row's record. Integers are int64; others are the bits of a float64.
LENGTH, LAST_TOKEN, NUM_PROMPT, HAS_FAILED = 0, 1, 2, 3
MIN_TOKENS, TOP_K, SEED, USES = 4, 5, 6, 7
TEMPERATURE, REPETITION, PRESENCE, FREQUENCY, MIN_P, TOP_P = 8, 9, 10, 11, 12, 13
WORDS = 16

# Bits of the word USES: which of the row's tables over the vocabulary hold anything.
USES_BIAS, USES_COUNTS, USES_BANNED = 1, 2, 4


def row_record(integers: Mapping[int, int], floats: Mapping[int, float]) -> list[int]:
    """The words of a row by field; those that are not given are 0."""
    words = [0] * WORDS
    for field, value in integers.items():
        words[field] = value - (1 << 64) if value >= 1 << 63 else value
    for field, value in floats.items():
        (words[field],) = struct.unpack("<q", struct.pack("<d", value))
    return words
