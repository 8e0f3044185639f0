"""The C++ sampler equals the numpy oracle, token for token; argmax and logprobs; the thread pool."""

from __future__ import annotations

import ctypes
import os
import time

import numpy as np
import pytest

from llmc.runtime import noise
from llmc.runtime.protocol import SamplingState
from llmc.runtime.sampling import History, sample_token, token_logprob

pytestmark = [pytest.mark.pure, pytest.mark.cpu]


class SampleRow(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("temperature", "repetition_penalty")),
        *((name, ctypes.c_float) for name in ("presence_penalty", "frequency_penalty")),
        *((name, ctypes.c_double) for name in ("min_p", "top_p")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_int64) for name in ("top_k", "min_tokens")),
        ("tokens", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_prompt_tokens")),
        ("banned", ctypes.c_void_p),
        ("num_banned", ctypes.c_int64),
        ("bias_ids", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
        ("num_biases", ctypes.c_int64),
        ("mask", ctypes.c_void_p),
    ]


@pytest.fixture(scope="module")
def libraries(build):
    loaded = build("sampling_harness.cpp")
    for library in loaded.values():
        library.run_sample.restype = library.scratch_bytes.restype = library.pool_work.restype = (
            ctypes.c_int64
        )
        library.scratch_bytes.argtypes = [ctypes.c_int64]
        library.pool_open.restype = ctypes.c_void_p
        library.pool_open.argtypes = [ctypes.c_int, ctypes.c_int]
        library.pool_open_wary.restype = ctypes.c_void_p
        library.pool_open_wary.argtypes = [ctypes.c_int, ctypes.c_int64]
        library.pool_close.argtypes = library.pool_threads.argtypes = [ctypes.c_void_p]
        library.pool_width.argtypes = library.pool_missed.argtypes = [ctypes.c_void_p, ctypes.c_int]
        library.pool_work.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        library.pool_tasks.restype = ctypes.c_int64
        library.pool_tasks.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
        library.pool_leave_task.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        library.pool_finish.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return loaded


def p(array):
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def n(value):
    return ctypes.c_int64(value)


def sampled(library, logits, state, history, mask, scratch):
    tokens = np.array(history.token_ids, dtype=np.int64)
    banned = np.array(state.banned_until_min, dtype=np.int64)
    bias_ids = np.array([i for i, _ in state.logit_bias], dtype=np.int64)
    biases = np.array([b for _, b in state.logit_bias], dtype=np.float32)
    row = SampleRow(
        state.temperature,
        state.repetition_penalty,
        state.presence_penalty,
        state.frequency_penalty,
        state.min_p,
        state.top_p,
        state.seed,
        state.top_k,
        state.min_tokens,
        tokens.ctypes.data,
        len(tokens),
        history.num_prompt_tokens,
        banned.ctypes.data,
        len(banned),
        bias_ids.ctypes.data,
        biases.ctypes.data,
        len(biases),
        None if mask is None else mask.ctypes.data,
    )
    token = library.run_sample(p(logits), n(len(logits)), ctypes.byref(row), p(scratch))
    return None if token < 0 else token


def random_state(rng, vocab):
    def sometimes(value, otherwise):
        return value if rng.random() < 0.5 else otherwise

    return SamplingState(
        temperature=float(rng.choice([0.0, 0.3, 0.7, 1.0, 1.5])),
        top_k=sometimes(int(rng.integers(1, vocab + 5)), 0),
        top_p=sometimes(float(rng.uniform(0.01, 0.999)), 1.0),
        min_p=sometimes(float(rng.choice([1e-4, 0.05, 0.3, 1.0])), 0.0),
        repetition_penalty=sometimes(float(rng.uniform(0.5, 2)), 1.0),
        presence_penalty=sometimes(float(rng.uniform(-1, 1)), 0.0),
        frequency_penalty=sometimes(float(rng.uniform(-1, 1)), 0.0),
        seed=int(rng.integers(0, 1 << 63)) * 2 + 1,
        min_tokens=int(rng.integers(0, 6)),
        banned_until_min=tuple(int(i) for i in rng.integers(0, vocab, 3)),
        logit_bias=tuple((int(i), float(rng.normal())) for i in rng.integers(0, vocab, 4)),
    )


def random_logits(rng, vocab):
    logits = (float(rng.choice([0.0, 0.1, 3.0, 20.0])) * rng.standard_normal(vocab)).astype(np.float32)
    if rng.random() < 0.5:
        logits = np.round(logits)  # many equal values
    if rng.random() < 0.2:
        logits[rng.integers(0, vocab, vocab // 2)] = -np.inf
    return logits


def test_samples_equal_the_oracle(libraries, rng):
    for trial in range(600):
        vocab = int(rng.choice([1, 7, 33, 100, 1000, 5000]))
        logits, state = random_logits(rng, vocab), random_state(rng, vocab)
        length = int(rng.integers(1, 30))
        ids = tuple(int(i) for i in rng.integers(0, min(vocab, 12), length))
        history = History(token_ids=ids, num_prompt_tokens=int(rng.integers(1, length + 1)))
        mask = None
        if rng.random() < 0.3:
            mask = rng.integers(0, 1 << 32, -(-vocab // 32), dtype=np.uint64).astype(np.uint32)
        expected = sample_token(logits, state, history, mask)
        for name, library in libraries.items():
            scratch = np.zeros(library.scratch_bytes(vocab) + 64, dtype=np.uint8)
            got = sampled(library, logits, state, history, mask, scratch)
            assert got == expected, (name, trial, state, vocab)
            counts = scratch[: library.scratch_bytes(vocab)].view(np.int32)[-(-vocab // 16) * 32 :]
            assert not counts.any()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_logits_that_are_not_finite_give_no_token(libraries, rng, poison):
    history = History(token_ids=(1,), num_prompt_tokens=1)
    for where in (0, 3, 17, 40):
        logits = rng.standard_normal(41).astype(np.float32)
        logits[where] = poison
        for library in libraries.values():
            scratch = np.zeros(library.scratch_bytes(41), dtype=np.uint8)
            assert sampled(library, logits, SamplingState(temperature=1.0), history, None, scratch) is None


def test_noise_is_the_oracles_to_the_bit(libraries, rng):
    ids = rng.integers(0, 300000, 5000).astype(np.uint32)
    seed, position = int(rng.integers(0, 1 << 63)), int(rng.integers(0, 1 << 20))
    expected = noise.gumbel(seed, position, ids.astype(np.int64))
    for library in libraries.values():
        out = np.empty(5000)
        library.run_noise(ctypes.c_uint64(seed), ctypes.c_uint32(position), p(ids), p(out), n(5000))
        np.testing.assert_array_equal(out, expected)


def test_argmax_is_the_first_of_the_largest(libraries, rng):
    best_type = np.dtype([("value", "f4"), ("index", "i4"), ("finite", "i4")])
    for vocab in (1, 15, 64, 65, 1000, 4097):
        logits = np.round(3 * rng.standard_normal((6, vocab))).astype(np.float32)
        logits[1] = -np.inf
        logits[2, -1] = np.nan
        logits[3, vocab // 2] = np.inf
        for library in libraries.values():
            for threads in (1, 2, 5):
                partial, best = np.zeros(threads * 6, best_type), np.zeros(6, best_type)
                library.run_best(threads, p(logits), n(6), n(vocab), p(partial), p(best))
                assert best["finite"].tolist() == [1, 1, 0, 0, 1, 1]
                clean = [0, 1, 4, 5]
                np.testing.assert_array_equal(best["index"][clean], logits[clean].argmax(axis=1))
                np.testing.assert_array_equal(best["value"][clean], logits[clean].max(axis=1))


def test_logprobs_are_the_oracles(libraries, rng):
    for vocab in (5, 300, 4000):
        logits = np.round(4 * rng.standard_normal(vocab), 1).astype(np.float32)
        token = int(rng.integers(0, vocab))
        expected = token_logprob(logits, token, 5)
        for library in libraries.values():
            logprob, rank = np.empty(1), np.empty(1, np.int64)
            top, top_logprobs = np.empty(5, np.int32), np.empty(5)
            library.run_logprob(
                p(logits), n(vocab), n(token), n(5), p(logprob), p(rank), p(top), p(top_logprobs)
            )
            assert rank[0] == expected.rank
            assert top.tolist() == [i for i, _ in expected.top]
            np.testing.assert_allclose(logprob[0], expected.logprob, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(top_logprobs, [v for _, v in expected.top], rtol=1e-12, atol=1e-12)


def expected_work(threads, regions, rounds):
    cells = [0] * threads
    for _ in range(regions):
        cells = [value + 1 for value in cells]
        for _ in range(rounds):
            cells = [(cells[(t + 1) % threads] * 3 + t) % 1000003 for t in range(threads)]
    return sum(cells)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("spins", [0, 4000])
def test_threads_meet_at_every_barrier(libraries, threads, spins):
    library = next(iter(libraries.values()))
    pool = library.pool_open(threads, spins)
    assert library.pool_threads(pool) == threads
    for regions, rounds in ((1, 1), (20, 7), (5, 30)):
        assert library.pool_work(pool, regions, rounds) == expected_work(threads, regions, rounds)
    library.pool_close(pool)


def test_fewer_threads_meet_at_a_barrier_while_others_want_the_cores(libraries):
    library = next(iter(libraries.values()))
    a_minute = 60 * 10**9
    pool = library.pool_open_wary(2, a_minute)
    assert library.pool_width(pool, 20_000) == 2
    assert [library.pool_width(pool, 0) for _ in range(3)] == [1, 1, 1]
    library.pool_close(pool)


def test_all_threads_meet_at_a_barrier_again_after_a_while(libraries):
    library = next(iter(libraries.values()))
    a_microsecond = 1000
    pool = library.pool_open_wary(2, a_microsecond)
    for _ in range(3):
        assert library.pool_width(pool, 20_000) == 2
        time.sleep(0.001)
    library.pool_close(pool)


@pytest.mark.parametrize("threads", [2, 5])
def test_no_thread_is_missed_at_a_barrier_while_their_number_changes(libraries, threads):
    library = next(iter(libraries.values()))
    pool = library.pool_open_wary(threads, 2_000_000)
    assert library.pool_missed(pool, 150) == 0
    library.pool_close(pool)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("spins", [0, 4000])
def test_a_task_beside_the_caller_meets_barriers_and_runs_at_most_once(libraries, threads, spins):
    library = next(iter(libraries.values()))
    pool, begun = library.pool_open(threads, spins), ctypes.c_int64()
    assert library.pool_tasks(pool, 210, ctypes.byref(begun)) == 0
    assert begun.value == 0 if threads == 1 else begun.value > 0
    library.pool_close(pool)


def test_pools_open_and_close_with_a_task_under_way(libraries):
    library = next(iter(libraries.values()))
    for threads in (1, 2, 3):
        pool, runs = library.pool_open(threads, 4000), ctypes.c_int64()
        library.pool_leave_task(pool, ctypes.byref(runs))
        library.pool_close(pool)
        assert runs.value <= 1
        found = runs.value
        time.sleep(0.03)
        assert runs.value == found


def test_a_forked_child_does_not_wait_for_its_parent_s_task(libraries):
    library = next(iter(libraries.values()))
    pool, runs = library.pool_open(2, 100_000), ctypes.c_int64()
    library.pool_leave_task(pool, ctypes.byref(runs))
    time.sleep(0.005)
    child = os.fork()
    if child == 0:
        library.pool_finish(pool, 1)
        good = library.pool_tasks(pool, 20, ctypes.byref(ctypes.c_int64())) == 0
        library.pool_close(pool)
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert library.pool_finish(pool, 1)
    assert runs.value == 1
    library.pool_close(pool)


def test_pools_open_and_close_without_work(libraries):
    library = next(iter(libraries.values()))
    for _ in range(20):
        library.pool_close(library.pool_open(3, 0))


def test_a_forked_child_works_alone_and_closes(libraries):
    library = next(iter(libraries.values()))
    pool = library.pool_open(3, 100)
    assert library.pool_work(pool, 2, 3) == expected_work(3, 2, 3)
    child = os.fork()
    if child == 0:
        good = library.pool_work(pool, 2, 3) == expected_work(1, 2, 3)
        library.pool_close(pool)
        os._exit(0 if good else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert library.pool_work(pool, 2, 3) == expected_work(3, 2, 3)
    library.pool_close(pool)
