"""Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as
1, 2, 3" (SC 2011). Knows counters and keys; what the bits are used for is `noise`'s business."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIER_0 = np.uint64(0xD2511F53)
_MULTIPLIER_1 = np.uint64(0xCD9E8D57)
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_NUM_ROUNDS = 10


def philox4x32(counter: NDArray[np.uint32], key: tuple[int, int]) -> NDArray[np.uint32]:
    """The four 32-bit outputs for each counter.

    `counter` is `[..., 4]` with word 0 first; `key` is its two 32-bit words. Same shape back.
    """
    words = counter.astype(np.uint64)
    c0, c1, c2, c3 = words[..., 0], words[..., 1], words[..., 2], words[..., 3]
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        product_0 = _MULTIPLIER_0 * c0
        product_1 = _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (
            (product_1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            product_1 & _LOW,
            (product_0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            product_0 & _LOW,
        )
        k0 = (k0 + _WEYL_0) & 0xFFFFFFFF
        k1 = (k1 + _WEYL_1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def token_bits(seed: int, position: int, token_ids: NDArray[np.int64]) -> NDArray[np.uint32]:
    """32 random bits for each vocabulary index in `token_ids` `[n]`, at one position of one sequence.

    Key: the low and high word of the 64-bit `seed`. Counter: (index // 4, position, 0, 0); lane
    index % 4 of the output is used, so four neighbours share one evaluation.
    """
    blocks, where = np.unique(token_ids // 4, return_inverse=True)
    counter = np.zeros((blocks.size, 4), dtype=np.uint32)
    counter[:, 0] = blocks
    counter[:, 1] = position
    bits = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return bits[where.reshape(-1), token_ids % 4]
