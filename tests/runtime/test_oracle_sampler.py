"""The oracle sampler: its generator against published vectors, its functions against exact ones, its filters
against obvious ones, its choices against the distribution they must follow."""

from __future__ import annotations

import dataclasses
import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.runtime import noise
from llmc.runtime.philox import philox4x32, token_bits
from llmc.runtime.protocol import SamplingState
from llmc.runtime.sampling import (
    History,
    sample_segment,
    sample_token,
    shape_logits,
    token_logprob,
    unpack_mask,
)

pytestmark = pytest.mark.pure

NOTHING = History(token_ids=(), num_prompt_tokens=0)
RANDOM = SamplingState(temperature=1.0)


def logits_of(rng, size, ties=False):
    values = rng.normal(size=size) * 3
    return (np.round(values) if ties else values).astype(np.float32)


# Known-answer vectors of Random123's kat_vectors for philox4x32-10: counter, key, output.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "output"), VECTORS)
def test_philox_gives_the_published_numbers(counter, key, output):
    words = np.array([[int(word, 16) for word in counter.split()]], dtype=np.uint32)
    low, high = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in philox4x32(words, (low, high))[0]] == output.split()


def test_token_bits_are_lanes_of_philox():
    seed, position = 0x0123456789ABCDEF, 77
    ids = np.array([0, 1, 2, 3, 4, 4099, 2, 150001])
    for token_id, bits in zip(ids, token_bits(seed, position, ids), strict=True):
        counter = np.array([token_id // 4, position, 0, 0], dtype=np.uint32)
        assert philox4x32(counter, (0x89ABCDEF, 0x01234567))[token_id % 4] == bits


def test_logarithm_is_accurate_where_noise_needs_it():
    getcontext().prec = 40
    rng = np.random.default_rng(3)
    values = np.concatenate(
        [rng.random(300), 1 - rng.random(300) * 1e-9, rng.random(300) * 1e-9, [0.5 * 2**-32]]
    )
    for value, found in zip(values, noise.log(values), strict=True):
        exact = Decimal(float(value)).ln()
        assert abs(Decimal(float(found)) - exact) <= abs(exact) * Decimal(2**-50) + Decimal("1e-300")


def test_exponential_is_accurate():
    values = -np.random.default_rng(4).random(2000) * 690
    exact = np.array([math.exp(value) for value in values])
    assert np.max(np.abs(noise.exp(values) / exact - 1)) < 2**-50
    assert noise.exp(np.array([0.0, -701.0, -np.inf])).tolist() == [1.0, 0.0, 0.0]


def test_noise_stays_within_its_bounds():
    extremes = (np.array([0, 2**32 - 1], dtype=np.float64) + 0.5) * 2.0**-32
    low, high = -noise.log(-noise.log(extremes))
    assert noise.MIN_NOISE < low < high < noise.MAX_NOISE


FIXED_NOISE = [
    "0x1.59b94631693dap+0",
    "0x1.a7dada4f1be66p-4",
    "0x1.3f05cd39309bbp+0",
    "0x1.8f25552013089p-1",
    "-0x1.32109a5a3fec6p-1",
    "-0x1.aaf423ffb7952p-1",
]


def test_noise_bits_are_fixed():
    """Other languages must give these; a change of one bit here changes every seeded output."""
    found = [float.hex(value) for value in noise.gumbel(42, 7, np.array([0, 1, 2, 3, 1000, 32000]))]
    assert found == FIXED_NOISE


def test_greedy_takes_the_lowest_of_equals():
    assert sample_token(np.array([1, 5, 5, 2], np.float32), SamplingState(), NOTHING) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_cannot_be_sampled(bad):
    logits = np.array([1, bad, 2], np.float32)
    for state in (SamplingState(), RANDOM):
        assert sample_token(logits, state, NOTHING) is None
        assert not sample_segment(0, np.stack([logits]), state, NOTHING).finite
    nothing_allowed = np.zeros(1, np.uint32)
    assert sample_token(np.ones(3, np.float32), RANDOM, NOTHING, nothing_allowed) is None
    assert sample_token(np.array([-np.inf, 1, -np.inf], np.float32), RANDOM, NOTHING) == 1


def obvious_probabilities(logits, state):
    """Temperature, min_p, top_k, top_p one after the other over a sorted list."""
    scaled = (logits - logits.max()).astype(np.float64) / state.temperature
    probabilities = np.exp(scaled)
    if state.min_p:
        probabilities[probabilities < state.min_p] = 0
    if state.top_k:
        probabilities[probabilities < np.sort(probabilities)[::-1][min(state.top_k, logits.size) - 1]] = 0
    probabilities /= probabilities.sum()
    if state.top_p < 1:
        kept = np.zeros(logits.size, bool)
        for index in range(logits.size):
            kept[index] = probabilities[probabilities > probabilities[index]].sum() < state.top_p
        probabilities[~kept] = 0
    return probabilities / probabilities.sum()


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    ties=st.booleans(),
    size=st.integers(1, 40),
    top_k=st.integers(0, 50),
    top_p=st.sampled_from([1.0, 0.97, 0.73, 0.31, 0.01]),
    min_p=st.sampled_from([0.0, 0.013, 0.2, 1.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
)
def test_filters_keep_what_the_obvious_ones_keep(seed, ties, size, top_k, top_p, min_p, temperature):
    rng = np.random.default_rng(seed)
    logits = logits_of(rng, size, ties)
    state = SamplingState(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    allowed = set(np.flatnonzero(obvious_probabilities(logits, state)).tolist())
    drawn = {sample_token(logits, dataclasses.replace(state, seed=number), NOTHING) for number in range(60)}
    assert drawn <= allowed
    likely = {int(index) for index in np.flatnonzero(obvious_probabilities(logits, state) > 0.25)}
    assert likely <= drawn


CASES = {
    "plain": SamplingState(temperature=1.0),
    "filtered": SamplingState(temperature=0.9, top_k=9, top_p=0.9, min_p=0.02),
}


@pytest.mark.parametrize(("case", "by"), [("plain", "seed"), ("plain", "position"), ("filtered", "seed")])
def test_choices_follow_the_distribution(case, by):
    """Chi-square of 20,000 draws; 4.9 standard deviations of the statistic, so one false alarm in 10^6."""
    state = CASES[case]
    logits = logits_of(np.random.default_rng(8), 17)
    expected = obvious_probabilities(logits, state) * 20000
    counts = np.zeros(17)
    for number in range(20000):
        if by == "seed":
            token = sample_token(logits, dataclasses.replace(state, seed=number * 7919), NOTHING)
        else:
            token = sample_token(logits, state, History(token_ids=range(number), num_prompt_tokens=0))
        counts[token] += 1
    assert counts[expected == 0].sum() == 0
    big = expected > 5
    statistic = ((counts[big] - expected[big]) ** 2 / expected[big]).sum()
    freedom = big.sum() - 1
    assert statistic < freedom + 4.9 * math.sqrt(2 * freedom) + 5
    assert abs(counts[~big].sum() - expected[~big].sum()) < 25


def test_rare_tokens_come_as_often_as_they_should():
    """A tail of many tokens, each far below 2^-24: coarse uniforms would never draw them."""
    size, tail = 50_000, 0.05
    logits = np.full(size, math.log(tail / size), dtype=np.float32)
    logits[0] = math.log(1 - tail)
    draws = 400
    seen = sum(
        sample_token(logits, SamplingState(temperature=1.0, seed=seed), NOTHING) != 0 for seed in range(draws)
    )
    assert abs(seen - draws * tail) < 4.9 * math.sqrt(draws * tail)


def test_penalties_bias_and_masks():
    state = SamplingState(
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logit_bias=((4, 3.0),),
        min_tokens=4,
        banned_until_min=(5,),
    )
    logits = np.array([1, -1, 2, 3, 0, 9, 7], np.float32)
    mask = np.array([0b0111111], np.uint32)
    history = History(token_ids=(0, 1, 2, 2, 3), num_prompt_tokens=2)
    shaped = shape_logits(logits, state, history, mask)
    assert shaped.tolist() == [0.5, -2.0, 2 / 2 - 2 * 0.5 - 0.25, 3 / 2 - 0.5 - 0.25, 3.0, -np.inf, -np.inf]
    longer = History(token_ids=(0, 1, 2, 2, 3, 3), num_prompt_tokens=2)
    assert shape_logits(logits, state, longer, mask)[5] == 9.0
    assert logits[5] == 9


def test_mask_bits_are_little_endian_words():
    mask = np.array([1 | 1 << 31, 1 << 1], np.uint32)
    assert np.flatnonzero(unpack_mask(mask, 40)).tolist() == [0, 31, 33]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_top=st.integers(0, 12), ties=st.booleans())
def test_logprobs_are_the_models_own(seed, num_top, ties):
    rng = np.random.default_rng(seed)
    logits = logits_of(rng, 10, ties)
    token_id = int(rng.integers(10))
    found = token_logprob(logits, token_id, num_top)
    wide = logits.astype(np.longdouble)
    exact = wide - np.log(np.exp(wide).sum())
    order = sorted(range(10), key=lambda index: (-logits[index], index))
    assert found.rank == order.index(token_id)
    assert [index for index, _ in found.top] == order[:num_top]
    assert abs(found.logprob - float(exact[token_id])) < 1e-12
    for index, value in found.top:
        assert abs(value - float(exact[index])) < 1e-12


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_good=st.integers(0, 4), temperature=st.sampled_from([0.0, 1.0]))
def test_drafts_give_the_plain_tokens(seed, num_good, temperature):
    rng = np.random.default_rng(seed)
    logits = np.stack([logits_of(rng, 12) for _ in range(5)])
    state = SamplingState(temperature=temperature, seed=seed, repetition_penalty=1.4, logprobs=1)
    tokens = [3, 1]
    for row in logits:
        tokens.append(sample_token(row, state, History(token_ids=tokens, num_prompt_tokens=1)))
    plain = tokens[2:]
    drafts = list(plain[:4])
    if num_good < 4:
        drafts[num_good] = (drafts[num_good] + 1) % 12
    result = sample_segment(9, logits, state, History(token_ids=[3, 1], num_prompt_tokens=1), drafts)
    assert result.num_accepted == num_good
    assert list(result.token_ids) == plain[: num_good + 1]
    assert [each.token_id for each in result.logprobs] == plain[: num_good + 1]
