"""Paged attention of the CPU kernels: against float64 over what the cache holds, and bit for bit across
chunkings, batches, page orders, threads and levels."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest

pytestmark = [pytest.mark.pure, pytest.mark.cpu]

PAGE = 32


class Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "k_width", "v_width", "page_tokens")),
        *((name, ctypes.c_int64) for name in ("window", "chunk")),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
        *((name, ctypes.c_void_p) for name in ("sinks", "q", "k", "v", "k_cache", "v_cache")),
        *((name, ctypes.c_void_p) for name in ("block_table", "query_starts", "positions", "slots")),
        *((name, ctypes.c_int64) for name in ("table_width", "sequences", "rows")),
        *((name, ctypes.c_void_p) for name in ("out", "scratch")),
        *((name, ctypes.c_int64) for name in ("threads", "max_context")),
    ]


@dataclass
class Shape:
    heads: int
    kv_heads: int
    k_width: int
    v_width: int
    bits: int = 16
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False
    scale: float = 0.2


@dataclass
class Sequence:
    """One sequence's whole q, k, v, of which steps take pieces."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    done: int = 0
    pages: list[int] = field(default_factory=list)


@pytest.fixture(scope="module")
def libraries(build):
    loaded = build("attention_harness.cpp")
    for library in loaded.values():
        library.scratch_bytes.restype = library.block_bytes.restype = ctypes.c_int64
        library.block_bytes.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return loaded


def aligned(num_bytes, fill=0):
    memory = np.full(num_bytes + 64, fill, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes]


class Machine:
    """A cache of one library, stepped over batches. Free memory is full of NaN, and pages are shuffled."""

    def __init__(self, library, shape, rng, num_pages, sinks=None):
        self.library, self.shape, self.sinks = library, shape, sinks
        block = shape.kv_heads * num_pages
        self.k_cache = aligned(block * library.block_bytes(shape.bits, PAGE, shape.k_width), 0xFF)
        self.v_cache = aligned(block * library.block_bytes(shape.bits, PAGE, shape.v_width), 0xFF)
        self.free = list(rng.permutation(num_pages))

    def step(self, pieces, threads=1):
        """Runs (sequence, tokens) pieces as one step: their outputs, `[tokens, H, V]` each."""
        s = self.shape
        rows = sum(tokens for _, tokens in pieces)
        table = np.full((len(pieces), 80), -1, dtype=np.int64)
        slots, positions = np.empty(rows, np.int64), np.empty(rows, np.int64)
        starts = np.zeros(len(pieces) + 1, dtype=np.int64)
        for i, (one, tokens) in enumerate(pieces):
            span = np.arange(one.done, one.done + tokens)
            while len(one.pages) * PAGE < one.done + tokens:
                one.pages.append(self.free.pop())
            table[i, : len(one.pages)] = one.pages
            oldest = max(0, one.done - s.window + 1) if s.window else 0
            oldest = max(oldest, one.done // s.chunk * s.chunk) if s.chunk else oldest
            table[i, : oldest // PAGE] = -1  # nobody can see them: the pages may be gone
            starts[i + 1] = starts[i] + tokens
            part = slice(starts[i], starts[i + 1])
            positions[part] = span
            slots[part] = np.array(one.pages)[span // PAGE] * PAGE + span % PAGE
        q, k, v = (
            np.concatenate([getattr(one, name)[one.done : one.done + tokens] for one, tokens in pieces])
            for name in "qkv"
        )
        out = np.full((rows, s.heads, s.v_width), np.nan, dtype=np.float32)
        call = Call(s.heads, s.kv_heads, s.k_width, s.v_width, PAGE, s.window, s.chunk, s.scale, s.softcap)
        arrays = {"q": q, "k": k, "v": v, "k_cache": self.k_cache, "v_cache": self.v_cache, "out": out}
        arrays |= {"block_table": table, "query_starts": starts, "positions": positions, "slots": slots}
        if self.sinks is not None:
            arrays["sinks"] = self.sinks
        for name, array in arrays.items():
            assert array.flags.c_contiguous
            setattr(call, name, array.ctypes.data)
        call.table_width, call.sequences, call.rows = table.shape[1], len(pieces), rows
        call.threads, call.max_context = threads, 80 * PAGE
        scratch = aligned(self.library.scratch_bytes(ctypes.byref(call)), 0xFF)
        call.scratch = scratch.ctypes.data
        self.library.run_attention(s.bits, ctypes.byref(call))
        for one, tokens in pieces:
            one.done += tokens
        return [out[a:b] for a, b in pairwise(starts)]


def random_sequence(rng, shape, length):
    def draw(heads, width):
        return rng.standard_normal((length, heads, width)).astype(np.float32)

    kv = shape.kv_heads
    return Sequence(2 * draw(shape.heads, shape.k_width), draw(kv, shape.k_width), draw(kv, shape.v_width))


def stored(values, bits):
    """What a cache gives back for `values`, in float64."""
    if bits == 32:
        return values.astype(np.float64)
    if bits == 16:
        raw = values.view(np.uint32)
        rounded = (raw + 0x7FFF + ((raw >> 16) & 1)) & np.uint32(0xFFFF0000)
        return rounded.astype(np.uint32).view(np.float32).astype(np.float64)
    peak = np.abs(values).max(axis=-1, keepdims=True)
    return np.rint(values * (np.float32(127) / peak)).astype(np.float64) * (peak / np.float32(127))


def reference(sequence, shape, length, sinks):
    k, v = stored(sequence.k[:length], shape.bits), stored(sequence.v[:length], shape.bits)
    share = shape.heads // shape.kv_heads
    k, v = np.repeat(k, share, axis=1), np.repeat(v, share, axis=1)
    scores = np.einsum("qhd,khd->hqk", sequence.q[:length].astype(np.float64), k) * np.float32(shape.scale)
    if shape.softcap:
        scores = np.tanh(scores / shape.softcap) * shape.softcap
    query, key = np.arange(length)[:, None], np.arange(length)[None, :]
    seen = key <= query
    if shape.window:
        seen &= key > query - shape.window
    if shape.chunk:
        seen &= key // shape.chunk == query // shape.chunk
    weights = np.exp(np.where(seen, scores, -np.inf))
    total = weights.sum(axis=2, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks.astype(np.float64))[:, None, None]
    return np.einsum("hqk,khv->qhv", weights / total, v)


SHAPES = {
    "gqa": Shape(8, 2, 64, 64),
    "gqa7": Shape(14, 2, 64, 64),
    "one_head": Shape(1, 1, 32, 32, bits=32),
    "many_heads": Shape(40, 1, 16, 16),
    "odd_widths": Shape(6, 3, 20, 36, bits=32),
    "window": Shape(4, 2, 32, 32, window=50),
    "chunk": Shape(4, 4, 32, 48, chunk=96),
    "softcap": Shape(4, 2, 32, 32, softcap=5.0),
    "sinks": Shape(4, 2, 64, 64, sinks=True, window=70),
    "int8": Shape(8, 2, 64, 64, bits=8),
    "int8_all": Shape(6, 2, 36, 20, bits=8, window=100, softcap=8.0, sinks=True),
}
TOLERANCE = {32: 3e-6, 16: 3e-6, 8: 1e-4}


@pytest.mark.parametrize("name", SHAPES)
def test_prefill_matches_float64(libraries, rng, name):
    shape = SHAPES[name]
    sinks = rng.standard_normal(shape.heads).astype(np.float32) if shape.sinks else None
    sequence = random_sequence(rng, shape, 203)
    expected = reference(sequence, shape, 203, sinks)
    for level, library in libraries.items():
        sequence.done, sequence.pages = 0, []
        (out,) = Machine(library, shape, rng, 8, sinks).step([(sequence, 203)])
        worst = np.abs(out - expected).max()
        assert worst <= TOLERANCE[shape.bits] * np.abs(sequence.v).max(), (level, worst)


@pytest.mark.parametrize("name", SHAPES)
def test_chunks_batches_threads_and_levels_give_the_same_bits(libraries, rng, name):
    shape = SHAPES[name]
    sinks = rng.standard_normal(shape.heads).astype(np.float32) if shape.sinks else None
    sequences = [random_sequence(rng, shape, length) for length in (151, 66, 1)]
    whole = []
    for one in sequences:
        whole += Machine(libraries["generic"], shape, rng, 8, sinks).step([(one, len(one.q))])
    for library in libraries.values():
        machine = Machine(library, shape, rng, 20, sinks)
        for one in sequences:
            one.done, one.pages = 0, []
        parts = [[] for _ in sequences]
        while any(one.done < len(one.q) for one in sequences):
            waiting = [i for i, one in enumerate(sequences) if one.done < len(one.q)]
            pieces = [
                (
                    sequences[i],
                    min(int(rng.choice([1, 1, 2, 5, 31, 64])), len(sequences[i].q) - sequences[i].done),
                )
                for i in waiting
            ]
            for i, out in zip(waiting, machine.step(pieces, threads=int(rng.integers(1, 5))), strict=True):
                parts[i].append(out)
        for out, expected in zip(parts, whole, strict=True):
            np.testing.assert_array_equal(np.concatenate(out), expected)


@pytest.mark.parametrize("bits", [16, 8])
def test_long_contexts_are_split_without_a_trace(libraries, rng, bits):
    shape = Shape(4, 1, 16, 16, bits=bits, sinks=True)
    sinks = rng.standard_normal(4).astype(np.float32)
    sequence = random_sequence(rng, shape, 2300)
    expected = reference(sequence, shape, 2300, sinks)[2295:]
    results = []
    for library in libraries.values():
        if library is libraries["generic"]:
            continue  # slow, and tied to the others by shorter tests
        for threads, pieces in ((1, [2300]), (3, [2295, 5]), (4, [2298, 1, 1])):
            sequence.done, sequence.pages = 0, []
            machine = Machine(library, shape, rng, 80, sinks)
            outs = [machine.step([(sequence, tokens)], threads)[0] for tokens in pieces]
            results.append(np.concatenate(outs)[2295:])
    assert np.abs(results[0] - expected).max() <= 3 * TOLERANCE[bits]
    for one in results[1:]:
        np.testing.assert_array_equal(one, results[0])


def test_a_query_that_is_not_finite_spoils_its_own_row_only(libraries, rng):
    for bits in (32, 16, 8):
        shape = Shape(4, 2, 32, 32, bits=bits)
        sequence = random_sequence(rng, shape, 40)
        for library in libraries.values():
            sequence.done, sequence.pages = 0, []
            (clean,) = Machine(library, shape, rng, 4).step([(sequence, 40)])
            kept = sequence.q[17, 1].copy()
            sequence.q[17, 1, 3] = np.nan
            sequence.done, sequence.pages = 0, []
            (out,) = Machine(library, shape, rng, 4).step([(sequence, 40)])
            sequence.q[17, 1] = kept
            assert np.isnan(out[17, 1]).all()
            out[17, 1] = clean[17, 1]
            np.testing.assert_array_equal(out, clean)
