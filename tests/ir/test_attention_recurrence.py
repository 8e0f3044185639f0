"""Attention: right against float64, and the same bits however a sequence is cut, batched or stored."""

from __future__ import annotations

import random

import pytest
import torch

from llmc.ir.attend import visible

llmc = torch.ops.llmc

SETTINGS = {
    "plain": {},
    "window": {"window": 7},
    "long window": {"window": 100},
    "chunk": {"chunk": 16},
    "both": {"window": 5, "chunk": 16},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True, "window": 9},
}


def tensors(length, heads=4, groups=2, k_dim=8, v_dim=8, seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    shapes = ((length, heads, k_dim), (length, groups, k_dim), (length, groups, v_dim))
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


def arguments(heads=4, *, sinks=False, window=0, softcap=0.0, chunk=0, scale=0.3):
    logits = torch.linspace(-1, 1, heads) if sinks else None
    return logits, scale, window, softcap, chunk


def packed(q, k, v, positions, sinks, *settings):
    return llmc.attention(q, k, v, positions, sinks, 0, 0, *settings)


def obvious(q, k, v, sinks, scale, window, softcap, chunk):
    """One sequence in float64, one query at a time."""
    q, k, v = q.double(), k.double(), v.double()
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    out = torch.empty(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    for query in range(q.shape[0]):
        seen = [
            key
            for key in range(query + 1)
            if not (window and key <= query - window) and not (chunk and key // chunk != query // chunk)
        ]
        for head in range(q.shape[1]):
            scores = scale * (k[seen, head] @ q[query, head])
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat((scores, sinks[head].double()[None]))
            weights = scores.softmax(0)[: len(seen)]
            out[query, head] = weights @ v[seen, head]
    return out


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
def test_packed_attention_agrees_with_float64(name, length):
    q, k, v = tensors(length, seed=length)
    settings = arguments(**SETTINGS[name])
    found = packed(q, k, v, torch.arange(length), *settings)
    assert torch.allclose(found.double(), obvious(q, k, v, *settings), atol=2e-6)


@pytest.mark.parametrize(
    "shape",
    [
        {"heads": 8, "groups": 1, "k_dim": 80, "v_dim": 80},
        {"heads": 3, "groups": 3, "k_dim": 24, "v_dim": 16},
        {"heads": 6, "groups": 2, "k_dim": 1, "v_dim": 5},
    ],
)
def test_odd_shapes(shape):
    q, k, v = tensors(70, **shape)
    settings = arguments(shape["heads"])
    found = packed(q, k, v, torch.arange(70), *settings)
    assert torch.allclose(found.double(), obvious(q, k, v, *settings), atol=2e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_changes_no_bit(name):
    settings = arguments(**SETTINGS[name])
    lengths = (70, 1, 33, 64)
    parts = [tensors(length, seed=length) for length in lengths]
    alone = [packed(*part, torch.arange(len(part[0])), *settings) for part in parts]
    joined = [torch.cat(tensor) for tensor in zip(*parts, strict=True)]
    positions = torch.cat([torch.arange(length) for length in lengths])
    assert torch.equal(packed(*joined, positions, *settings), torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("page_tokens", [1, 8, 48])
def test_neither_chunks_nor_pages_change_a_bit(name, dtype, page_tokens):
    """Two sequences, cut at random, their pages scattered, against each alone and whole."""
    settings = arguments(**SETTINGS[name])
    draw = random.Random(page_tokens)
    parts = [tensors(length, seed=length, dtype=dtype) for length in (150, 40)]
    expected = [packed(*part, torch.arange(len(part[0])), *settings) for part in parts]
    counts = [-(-len(part[0]) // page_tokens) for part in parts]
    pages = list(range(sum(counts)))
    draw.shuffle(pages)
    table = torch.full((2, max(counts)), -1)
    table[0, : counts[0]] = torch.tensor(pages[: counts[0]])
    table[1, : counts[1]] = torch.tensor(pages[counts[0] :])
    caches = [torch.full((sum(counts), page_tokens, 2, 8), torch.nan, dtype=dtype) for _ in range(2)]
    done, found = [0, 0], [[], []]
    while any(done[s] < len(parts[s][0]) for s in range(2)):
        sizes = [min(draw.choice((0, 1, 5, 40)), len(parts[s][0]) - done[s]) for s in range(2)]
        spans = [range(done[s], done[s] + sizes[s]) for s in range(2)]
        q, k, v = (torch.cat([parts[s][i][done[s] : done[s] + sizes[s]] for s in range(2)]) for i in range(3))
        where = [(s, *divmod(p, page_tokens)) for s in range(2) for p in spans[s]]
        slots = [int(table[s, page]) * page_tokens + offset for s, page, offset in where]
        written = llmc.kv_write(k, v, *caches, torch.tensor(slots, dtype=torch.int64))
        positions = torch.tensor([p for span in spans for p in span], dtype=torch.int64)
        starts = torch.tensor([0, sizes[0], sizes[0] + sizes[1]])
        sinks, *rest = settings
        out = llmc.paged_attention(q, *caches, written, table, starts, positions, sinks, *rest)
        for s, rows in enumerate(out.split(sizes)):
            done[s] += sizes[s]
            found[s].append(rows)
    for s in range(2):
        assert torch.equal(torch.cat(found[s]), expected[s])


def test_pages_that_nobody_sees_are_not_read():
    q, k, v = tensors(1)
    caches = [torch.full((2, 4, 2, 8), torch.nan) for _ in range(2)]
    for position in (8, 9, 10, 11):
        slot = torch.tensor([4 + position % 4])
        written = llmc.kv_write(k, v, *caches, slot)
    table = torch.tensor([[-1, -1, 1]])
    out = llmc.paged_attention(
        q, *caches, written, table, torch.tensor([0, 1]), torch.tensor([11]), None, 0.3, 4, 0.0, 0
    )
    assert out.isfinite().all()
    assert torch.allclose(out, v.repeat_interleave(2, 1), atol=1e-6)


def test_negative_slots_are_skipped():
    _, k, v = tensors(3)
    caches = [torch.zeros(2, 4, 2, 8) for _ in range(2)]
    llmc.kv_write(k, v, *caches, torch.tensor([5, -1, 2]))
    assert torch.equal(caches[0][1, 1], k[0])
    assert torch.equal(caches[1][0, 2], v[2])
    assert int((caches[0] != 0).any(-1).any(-1).sum()) == 2


def test_visibility_is_what_the_spec_says():
    positions, keys = torch.arange(20), torch.arange(20)
    for window, chunk in ((0, 0), (3, 0), (0, 4), (6, 4)):
        mask = visible(positions, keys, window, chunk)
        for query in range(20):
            for key in range(20):
                expected = key <= query
                expected &= not window or key > query - window
                expected &= not chunk or key // chunk == query // chunk
                assert bool(mask[query, key]) == expected


def test_rotation_and_write_are_what_they_join():
    q, k, v = tensors(5)
    positions, freq = torch.arange(5), torch.tensor([1.0, 0.1, 0.01, 0.001])
    slots = torch.tensor([3, 1, 0, 2, 7])
    joined, apart = ([torch.zeros(2, 4, 2, 8) for _ in range(2)] for _ in range(2))
    rotation = (positions, freq, 1.5, "half", False)
    rotated, written = llmc.rope_kv_write(q, k, v, *rotation, *joined, slots)
    llmc.kv_write(llmc.rope(k, *rotation), v, *apart, slots)
    assert torch.equal(rotated, llmc.rope(q, *rotation))
    assert written.numel() == 0
    assert all(torch.equal(one, other) for one, other in zip(joined, apart, strict=True))
