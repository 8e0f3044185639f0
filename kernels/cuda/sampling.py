"""Sampling as `runtime.sampling` defines it, to the token: every filter is a predicate on a value, sums are
of integers, noise is counted, so that it does not matter how a row's vocabulary is cut into programs.

Thresholds are found by their bits, 11, 10 and 10 at a time, with a histogram of the next ones each. The key
of a scaled logit, which is never above 0, is the bits of its size: a smaller key is a better token.
"""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl

from .noise import exp_exact, gumbel

# Fields of a row's record; `kernels.cuda.row_state` has them all.
_LENGTH = tl.constexpr(0)
_NUM_PROMPT = tl.constexpr(2)
_MIN_TOKENS = tl.constexpr(4)
_TOP_K = tl.constexpr(5)
_SEED = tl.constexpr(6)
_USES = tl.constexpr(7)
_TEMPERATURE = tl.constexpr(8)
_REPETITION = tl.constexpr(9)
_PRESENCE = tl.constexpr(10)
_FREQUENCY = tl.constexpr(11)
_MIN_P = tl.constexpr(12)
_TOP_P = tl.constexpr(13)
_WORDS = tl.constexpr(16)
# Bins of a histogram, and the key above which no value lies: -inf.
_BINS = tl.constexpr(2048)
_NO_KEY = tl.constexpr(0x7F800000)


@triton.jit
def real(state_ptr, row, FIELD: tl.constexpr):
    """A float64 field of a row."""
    return tl.load(state_ptr + row * _WORDS + FIELD).to(tl.float64, bitcast=True)


@triton.jit
def best_of_row(best_ptr, place_ptr, at, CHUNKS: tl.constexpr, CHUNK_BLOCK: tl.constexpr):
    """The largest of a row's partial results `best[CHUNKS]` and the first place where it stands."""
    chunk = tl.arange(0, CHUNK_BLOCK)
    inside = chunk < CHUNKS
    best = tl.load(best_ptr + at * CHUNKS + chunk, mask=inside, other=-float("inf"))
    place = tl.load(place_ptr + at * CHUNKS + chunk, mask=inside, other=2147483647)
    top = tl.max(best, 0)
    return top, tl.min(tl.where(best == top, place, 2147483647), 0)


@triton.jit
def penalised(x, token, inside, row, at, ahead, state_ptr, counts_ptr, drafts_ptr, V: tl.constexpr):
    """Repetition, frequency and presence penalty; the `ahead` drafts before logit row `at` count as
    generated."""
    counts = tl.load(counts_ptr + row * V + token, mask=inside, other=0)
    generated = counts >> 1
    for index in tl.range(0, ahead):  # pyright: ignore[reportGeneralTypeIssues]
        generated += (token == tl.load(drafts_ptr + at - ahead + index)).to(tl.int32)
    repetition = real(state_ptr, row, _REPETITION).to(tl.float32)
    seen = (generated > 0) | ((counts & 1) != 0)
    if repetition != 1.0:
        divisor = tl.zeros_like(x) + repetition
        x = tl.where(seen, tl.where(x > 0, tl.div_rn(x, divisor), x * repetition), x)
    frequency = real(state_ptr, row, _FREQUENCY).to(tl.float32)
    presence = real(state_ptr, row, _PRESENCE).to(tl.float32)
    if (frequency != 0.0) | (presence != 0.0):
        lowered = (x - frequency * generated.to(tl.float32)) - presence
        x = tl.where(generated > 0, lowered, x)
    return x


@triton.jit
def shape_logits(
    logits_ptr,
    row_of_ptr,
    ahead_ptr,
    drafts_ptr,
    mask_of_ptr,
    masks_ptr,
    state_ptr,
    counts_ptr,
    bias_ptr,
    banned_ptr,
    shaped_ptr,
    best_ptr,
    place_ptr,
    bad_ptr,
    V: tl.constexpr,
    MASK_WORDS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Masks, biases and penalties of logit rows `[R, V]`, and of each chunk the largest value, its first
    token, and whether any logit was NaN or +inf. Grid (R, CHUNKS).

    Logit row r belongs to request row `row_of[r]` (negative: nobody's) and stands behind `ahead[r]` drafts,
    which are `drafts[r - ahead[r]]` on. `mask_of[r]` is its row of allowed tokens in `masks`, or negative.
    """
    at = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    row = tl.load(row_of_ptr + at).to(tl.int64)
    if row >= 0:
        token = chunk * BLOCK + tl.arange(0, BLOCK)
        inside = token < V
        x = tl.load(logits_ptr + at * V + token, mask=inside, other=-float("inf")).to(tl.float32)
        bad = (x != x) | (x == float("inf"))
        tl.store(bad_ptr + at * CHUNKS + chunk, tl.max(bad.to(tl.int32), 0))
        mask_row = tl.load(mask_of_ptr + at).to(tl.int64)
        if mask_row >= 0:
            words = tl.load(masks_ptr + mask_row * MASK_WORDS + token // 32, mask=inside, other=0)
            x = tl.where(((words >> (token % 32)) & 1) != 0, x, -float("inf"))
        ahead = tl.load(ahead_ptr + at)
        record = state_ptr + row * _WORDS
        uses = tl.load(record + _USES)
        generated = tl.load(record + _LENGTH) + ahead - tl.load(record + _NUM_PROMPT)
        if ((uses & 4) != 0) & (generated < tl.load(record + _MIN_TOKENS)):
            words = tl.load(banned_ptr + row * MASK_WORDS + token // 32, mask=inside, other=0)
            x = tl.where(((words >> (token % 32)) & 1) != 0, -float("inf"), x)
        if (uses & 1) != 0:
            x += tl.load(bias_ptr + row * V + token, mask=inside, other=0.0)
        if (uses & 2) != 0:
            x = penalised(x, token, inside, row, at, ahead, state_ptr, counts_ptr, drafts_ptr, V)
        tl.store(shaped_ptr + at * V + token, x, mask=inside)
        sane = tl.where(bad, -float("inf"), x)
        top = tl.max(sane, 0)
        tl.store(best_ptr + at * CHUNKS + chunk, top)
        tl.store(place_ptr + at * CHUNKS + chunk, tl.min(tl.where(sane == top, token, 2147483647), 0))


@triton.jit
def scaled_block(shaped_ptr, at, chunk, top, temperature, V: tl.constexpr, BLOCK: tl.constexpr):
    """A chunk of `(logit - top) / temperature`, its keys, and its tokens; -inf beyond the vocabulary."""
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(shaped_ptr + at * V + token, mask=token < V, other=-float("inf"))
    scaled = tl.div_rn(x - top, tl.zeros_like(x) + temperature)
    # A zero of either sign has key 0.
    key = scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return scaled, key, token


@triton.jit
def counted_block(scaled, key, limit_key, min_p):
    """Which of a chunk's tokens are left by min_p and by a largest key."""
    kept = (key < _NO_KEY) & (key <= limit_key)
    if min_p > 0.0:
        kept = kept & (exp_exact(scaled.to(tl.float64)) >= min_p)
    return kept


@triton.jit
def count_keys(
    shaped_ptr,
    row_of_ptr,
    best_ptr,
    place_ptr,
    state_ptr,
    keys_ptr,
    bins_ptr,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    """Adds to `bins[R, 2048]` how many tokens (or how much mass, in 2**-40 of the best token's) have which
    next bits of the key. Grid (R, CHUNKS).

    `SHIFT` 20, 10, 0 are the three rounds; tokens count whose bits above are those of `keys[R, 2]`, element 0
    for top_k and element 1, `BY_MASS`, for top_p, which sees only what top_k leaves.
    """
    at = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    row = tl.load(row_of_ptr + at).to(tl.int64)
    if row >= 0:
        temperature = real(state_ptr, row, _TEMPERATURE).to(tl.float32)
        top_k = tl.load(state_ptr + row * _WORDS + _TOP_K)
        wanted = top_k > 0
        if BY_MASS:
            wanted = real(state_ptr, row, _TOP_P) < 1.0
        if wanted & (temperature != 0.0):
            found = best_of_row(best_ptr, place_ptr, at, CHUNKS, CHUNK_BLOCK)
            scaled, key, _ = scaled_block(shaped_ptr, at, chunk, found[0], temperature, V, BLOCK)
            limit_key = tl.full([1], 2147483647, tl.int32)
            if BY_MASS:
                limit_key = tl.where(top_k > 0, tl.load(keys_ptr + at * 2), 2147483647)
            kept = counted_block(scaled, key, limit_key, real(state_ptr, row, _MIN_P))
            if SHIFT < 20:
                own = tl.load(keys_ptr + at * 2 + (1 if BY_MASS else 0))
                kept = kept & ((key >> (SHIFT + 10)) == (own >> (SHIFT + 10)))
            digit = (key >> SHIFT) & (2047 if SHIFT == 20 else 1023)
            weight = kept.to(tl.int64)
            if BY_MASS:
                weight = (exp_exact(scaled.to(tl.float64)) * 1099511627776.0).to(tl.int64)
            tl.atomic_add(bins_ptr + at * _BINS + digit, weight, mask=kept, sem="relaxed")


@triton.jit
def choose_bits(
    row_of_ptr,
    state_ptr,
    bins_ptr,
    keys_ptr,
    sums_ptr,
    SHIFT: tl.constexpr,
    BY_MASS: tl.constexpr,
):
    """The next bits of each row's largest key with less than the wanted count or mass below it, and the bins
    back to 0. Grid (R,).

    `sums[R, 2]` carries what lies below the key, and the limit, from round to round.
    """
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(row_of_ptr + at).to(tl.int64)
    if row >= 0:
        bin = tl.arange(0, _BINS)
        held = tl.load(bins_ptr + at * _BINS + bin)
        if SHIFT == 20:
            below = tl.sum(held, 0) * 0
            if BY_MASS:
                limit = (real(state_ptr, row, _TOP_P) * tl.sum(held, 0).to(tl.float64)).to(tl.int64)
            else:
                limit = tl.load(state_ptr + row * _WORDS + _TOP_K)
            key = tl.full([], 0, tl.int32)
        else:
            below = tl.load(sums_ptr + at * 2)
            limit = tl.load(sums_ptr + at * 2 + 1)
            key = tl.load(keys_ptr + at * 2 + (1 if BY_MASS else 0))
        before = below + tl.cumsum(held, 0) - held
        digits: tl.constexpr = 2048 if SHIFT == 20 else 1024
        fits = (before < limit) & (bin < digits)
        digit = tl.maximum(tl.sum(fits.to(tl.int32), 0) - 1, 0)
        below += tl.sum(tl.where(bin < digit, held, 0), 0)
        tl.store(keys_ptr + at * 2 + (1 if BY_MASS else 0), key | (digit << SHIFT))
        tl.store(sums_ptr + at * 2, below)
        tl.store(sums_ptr + at * 2 + 1, limit)
        tl.store(bins_ptr + at * _BINS + bin, tl.zeros_like(held))


@triton.jit
def draw(
    shaped_ptr,
    row_of_ptr,
    ahead_ptr,
    best_ptr,
    place_ptr,
    state_ptr,
    keys_ptr,
    score_ptr,
    drawn_ptr,
    V: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    FILTERED: tl.constexpr,
):
    """Of each chunk the token with the highest sum of scaled logit and noise, and that sum: `score[R,
    CHUNKS]`, `drawn[R, CHUNKS]`. Greedy rows do nothing. Grid (R, CHUNKS).

    Without `FILTERED` no row has top_k or top_p, and `keys` is not read.
    """
    at = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    row = tl.load(row_of_ptr + at).to(tl.int64)
    if row >= 0:
        record = state_ptr + row * _WORDS
        temperature = real(state_ptr, row, _TEMPERATURE).to(tl.float32)
        if temperature != 0.0:
            found = best_of_row(best_ptr, place_ptr, at, CHUNKS, CHUNK_BLOCK)
            scaled, key, token = scaled_block(shaped_ptr, at, chunk, found[0], temperature, V, BLOCK)
            limit_key = tl.full([1], 2147483647, tl.int32)
            if FILTERED:
                by_count = tl.where(tl.load(record + _TOP_K) > 0, tl.load(keys_ptr + at * 2), 2147483647)
                has_mass = real(state_ptr, row, _TOP_P) < 1.0
                by_mass = tl.where(has_mass, tl.load(keys_ptr + at * 2 + 1), 2147483647)
                limit_key = tl.minimum(by_count, by_mass)
            kept = counted_block(scaled, key, limit_key, real(state_ptr, row, _MIN_P))
            position = tl.load(record + _LENGTH) + tl.load(ahead_ptr + at)
            seed = tl.load(record + _SEED)
            score = scaled.to(tl.float64) + gumbel(seed, position, chunk * BLOCK, BLOCK)
            score = tl.where(kept, score, -float("inf"))
            top = tl.max(score, 0)
            tl.store(score_ptr + at * CHUNKS + chunk, top)
            tl.store(drawn_ptr + at * CHUNKS + chunk, tl.min(tl.where(score == top, token, 2147483647), 0))
