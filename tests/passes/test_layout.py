"""The cache layout, and programs over it: groups, inputs, numbers over mixed chunked schedules."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from llmc.ir.infer import infer
from llmc.ir.interpret import interpret
from llmc.ir.paged import PagedSequence, allocate_caches, paged_inputs, scatter_pages, step_inputs
from llmc.ir.printer import print_node, symbol_names
from llmc.passes.base import PassContext
from llmc.passes.fuse_rope_cache import FuseRopeCache
from llmc.passes.graph import calls
from llmc.passes.instruments import NumericContract, Verification
from llmc.passes.kv_layout import KvLayout, plan_cache
from llmc.passes.manager import run_passes
from llmc.passes.paged_attention import PagedAttention
from llmc.passes.probe import logits_of, probe_sequences
from llmc.spec.cache import CacheGroup
from llmc.spec.errors import InternalError
from llmc.spec.model import AttentionSpec, ModelSpec

ops = torch.ops.llmc
CONTEXT = PassContext()


def paged(program, *more, dtype="auto", page_tokens=4):
    passes = (KvLayout(dtype=dtype, page_tokens=page_tokens), PagedAttention(expect=1), *more)
    return run_passes(program, passes, CONTEXT, [Verification(), NumericContract()])


def spec_of(*layers):
    """A spec of attention layers given as (kv_heads, dim, window, chunk, kv_source)."""
    attention = tuple(
        AttentionSpec(
            layer=index,
            num_heads=8,
            num_kv_heads=heads,
            qk_dim=dim,
            v_dim=dim,
            scale=1.0,
            window=window,
            chunk=chunk,
            kv_source=source,
        )
        for index, (heads, dim, window, chunk, source) in enumerate(layers)
    )
    return ModelSpec(
        family="x",
        architecture="X",
        num_layers=len(layers),
        hidden_size=8,
        vocab_size=8,
        max_context=64,
        compute_dtype="float32",
        tied_head=False,
        num_parameters=0,
        attention=attention,
    )


def test_layers_of_one_shape_and_visibility_share_a_group():
    spec = spec_of(
        (2, 64, 512, 0, 0), (2, 64, 0, 0, 1), (2, 64, 512, 0, 2), (1, 128, 0, 0, 3), (2, 64, 0, 64, 4)
    )
    layout = plan_cache(spec, "bfloat16", 32)
    found = [(group.layers, group.kind, group.window, group.num_kv_heads) for group in layout.groups]
    assert found == [
        ((0, 2), "window", 512, 2),
        ((1,), "full", 0, 2),
        ((3,), "full", 0, 1),
        ((4,), "chunk", 64, 2),
    ]
    assert layout.groups[0].bytes_per_token == 2 * 2 * 128 * 2
    assert layout.owner_of(2) == (0, 2)


def test_readers_of_a_shared_layer_own_nothing():
    layout = plan_cache(spec_of((2, 64, 0, 0, 0), (2, 64, 0, 0, 0), (2, 64, 8, 0, 2)), "float32", 16)
    assert [group.layers for group in layout.groups] == [(0,), (2,)]
    assert layout.groups[0].shared == ((1, 0),)
    assert layout.owner_of(1) == (0, 0)


def test_a_reader_that_sees_further_keeps_the_pages_of_its_owner():
    layout = plan_cache(spec_of((2, 64, 8, 0, 0), (2, 64, 0, 0, 0)), "float32", 16)
    assert (layout.groups[0].kind, layout.groups[0].window) == ("full", 0)


def test_reading_from_a_reader_is_an_error():
    with pytest.raises(InternalError, match="Attention layer 2 reads the cache of layer 1"):
        plan_cache(spec_of((2, 64, 0, 0, 0), (2, 64, 0, 0, 0), (2, 64, 0, 0, 1)), "float32", 16)


def test_inputs_stand_in_the_agreed_order(toy):
    done = paged(toy(windows=(8, 0)))
    expected = """input_ids positions out_rows query_starts block_table_0 slots_0 block_table_1 slots_1
        k_cache_0 v_cache_0 k_cache_1 v_cache_1"""
    assert [entry.name for entry in done.inputs] == expected.split()
    shapes = {entry.name: entry.shape for entry in done.inputs}
    assert shapes["query_starts"] == ("Q",)
    assert shapes["block_table_1"] == ("S", "B1")
    assert shapes["k_cache_1"] == ("P1", 4, 2, 8)


VARIANTS = {
    "plain": {},
    "window": {"windows": (6, 0)},
    "chunk": {"chunks": (0, 8)},
    "window in chunk": {"windows": (5, 0), "chunks": (8, 0)},
    "shared": {"kv_sources": (0, 0)},
    "sinks": {"sinks": True, "windows": (3, 0)},
    "no rope": {"rope": False},
    "odd heads": {"num_heads": 3, "num_kv_heads": 1, "head_dim": 80},
    "mixture": {"experts": 4},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_schedule_gives_the_logits_of_whole_sequences(toy, variant):
    before = toy(**VARIANTS[variant])
    done = paged(before, FuseRopeCache())
    draw = random.Random(7)
    sequences = [[draw.randrange(61) for _ in range(length)] for length in (70, 1, 9)]
    expected = logits_of(before, sequences).split([len(sequence) for sequence in sequences])
    tolerance = 0.02 if "dtype" in VARIANTS[variant] else 1e-6
    for one, other in zip(expected, run_schedule(done, sequences), strict=True):
        assert (one - other).abs().max() <= tolerance * one.abs().max()


def run_schedule(program, sequences):
    """Chunks of random length in steps of random membership and order, all rows wanted."""
    draw = random.Random(3)
    layout = program.cache
    pages = scatter_pages(layout, [len(sequence) for sequence in sequences], seed=5)
    caches = allocate_caches(layout, [count + 2 for count in pages.num_pages])
    done = [0] * len(sequences)
    rows = [[] for _ in sequences]
    while waiting := [index for index, sequence in enumerate(sequences) if done[index] < len(sequence)]:
        draw.shuffle(waiting)
        step = {}
        for index in waiting[: draw.randint(1, len(waiting))]:
            tokens = sequences[index][done[index] :][: draw.choice((1, 5, 23))]
            step[index] = PagedSequence(
                start=done[index],
                token_ids=tokens,
                block_tables=freed(layout, pages.tables[index], done[index]),
                wanted=range(len(tokens)),
            )
        inputs = step_inputs(layout, list(step.values()))
        logits = interpret(program.graph, {**inputs, **caches}, program.weights.evaluate)
        sizes = [len(part.token_ids) for part in step.values()]
        for index, size, new in zip(step, sizes, logits.split(sizes), strict=True):
            done[index] += size
            rows[index].append(new)
    return [torch.cat(parts) for parts in rows]


def freed(layout, tables, start):
    """Block tables without the pages that no query from `start` on can see."""
    result = []
    for group, table in zip(layout.groups, tables, strict=True):
        if group.kind == "window":
            oldest = max(0, start - group.window + 1)
        elif group.kind == "chunk":
            oldest = start // group.window * group.window
        else:
            oldest = 0
        dead = oldest // group.page_tokens
        result.append([-1] * dead + list(table[dead:]))
    return result


def test_a_narrower_cache_is_lossy_and_measured(toy):
    done = paged(toy(), dtype="bfloat16")
    record = done.history[1]
    assert 0 < record.divergence < 0.1
    assert done.cache.groups[0].dtype == "bfloat16"
    assert paged(toy()).history[1].divergence < 1e-6


def test_shared_layers_write_once_and_their_keys_are_dropped(toy):
    done = paged(toy(kv_sources=(0, 0)))
    assert len(calls(done.graph, ops.kv_write.default)) == 1
    readers = calls(done.graph, ops.paged_attention.default)
    assert {node.args[1].name for node in readers} == {"k_cache_0"}
    assert readers[0].args[3] is readers[1].args[3]
    assert "layers.1.attn.k.weight" not in done.weights


def test_rotations_join_the_cache_write(toy, golden):
    done = paged(toy(num_layers=1), FuseRopeCache(expect=1))
    assert not calls(done.graph, ops.rope.default)
    assert not calls(done.graph, ops.kv_write.default)
    symbols = symbol_names(done.graph, done.inputs)
    golden("\n".join(print_node(node, symbols) for node in done.graph.nodes) + "\n", "paged.txt")


def test_without_rotation_the_cache_write_stands_alone(toy):
    done = paged(toy(rope=False), FuseRopeCache())
    assert done.history[-1].misses == (
        "kv_write: its k is not rotated last",
        "kv_write_1: its k is not rotated last",
    )


def test_different_angles_are_a_miss(toy):
    program = toy(num_layers=1)
    graph = program.copy_graph()
    calls(graph, ops.rope.default)[0].update_arg(3, 2.0)
    done = paged(program.replace(graph=graph), FuseRopeCache())
    assert done.history[-1].misses == ("kv_write: its q and k turn by different angles",)


def test_a_query_scaled_after_its_rotation_is_a_miss(toy):
    program = toy(num_layers=1)
    graph = program.copy_graph()
    attention = calls(graph, ops.attention.default)[0]
    with graph.inserting_before(attention):
        scaled = graph.call_function(torch.ops.aten.mul.Tensor, (attention.args[0], 2.0))
    attention.update_arg(0, scaled)
    done = paged(program.replace(graph=graph), FuseRopeCache())
    assert done.history[-1].misses == ("kv_write: its q is not rotated last",)


GROUP = CacheGroup(layers=(0,), num_kv_heads=1, k_dim=4, v_dim=2, dtype="float32", page_tokens=4)


def test_step_inputs_are_what_block_tables_say(toy):
    layout = plan_cache(spec_of((1, 4, 0, 0, 0)), "float32", 4)
    inputs = step_inputs(
        layout,
        [
            PagedSequence(start=3, token_ids=[7, 8, 9], block_tables=[[5, 2]], wanted=[2]),
            PagedSequence(start=0, token_ids=[4], block_tables=[[0]], wanted=[]),
        ],
    )
    found = {name: value.tolist() for name, value in inputs.items()}
    assert found == {
        "input_ids": [7, 8, 9, 4],
        "positions": [3, 4, 5, 0],
        "out_rows": [2],
        "query_starts": [0, 3, 4],
        "block_table_0": [[5, 2], [0, -1]],
        "slots_0": [23, 8, 9, 0],
    }


@pytest.mark.parametrize("table", [[1], [1, -1]])
def test_a_token_without_a_page_is_an_error(table):
    layout = plan_cache(spec_of((1, 4, 0, 0, 0)), "float32", 4)
    with pytest.raises(InternalError, match="position 4 has no page"):
        step_inputs(layout, [PagedSequence(start=3, token_ids=[7, 8], block_tables=[table])])


@pytest.mark.parametrize(("dtype", "scales"), [("int8", False), ("float8_e4m3fn", False), ("float32", True)])
def test_codes_have_scales_and_nothing_else_has(dtype, scales):
    layout = plan_cache(spec_of((1, 4, 0, 0, 0)), dtype, 4)
    odd = replace(layout, groups=(replace(layout.groups[0], scales=scales),))
    with pytest.raises(InternalError, match=r"layers \[0\] cannot be allocated"):
        allocate_caches(odd, [3])


@pytest.mark.parametrize(("option", "dtype"), [("int8", torch.int8), ("fp8", torch.float8_e4m3fn)])
def test_a_cache_of_codes_is_written_and_read_with_scales(toy, option, dtype):
    program = toy(windows=(8, 0))
    plain = paged(program)
    done = paged(program, FuseRopeCache(), dtype=option)
    group = done.cache.groups[0]
    assert group.scales
    assert group.bytes_per_token == len(group.layers) * group.num_kv_heads * (group.k_dim + group.v_dim + 8)
    caches = allocate_caches(done.cache, [3] * len(done.cache.groups))
    assert caches["k_cache_0"].dtype == dtype
    assert caches["k_scales_0"].shape == caches["k_cache_0"].shape[:3]
    assert caches["v_scales_1"].dtype == torch.float32
    sequences = probe_sequences(done.spec, seed=3)
    expected, found = logits_of(plain, sequences), logits_of(done, sequences)
    error = (found - expected).abs().max() / expected.abs().max()
    assert 0 < error < {"int8": 0.03, "fp8": 0.2}[option]


def test_scattered_pages_are_a_partition():
    layout = plan_cache(spec_of((1, 4, 0, 0, 0), (1, 8, 0, 0, 1)), "float32", 4)
    pages = scatter_pages(layout, [9, 1, 4], seed=1)
    for group in range(2):
        held = [page for tables in pages.tables for page in tables[group]]
        assert sorted(held) == list(range(pages.num_pages[group])) == list(range(5))
    assert [len(tables[0]) for tables in pages.tables] == [3, 1, 1]


def test_paged_inputs_infer_with_distinct_symbols(toy):
    done = paged(toy(windows=(8, 0)))
    fresh = done.replace(graph=done.copy_graph())
    for node in fresh.graph.nodes:
        node.meta.clear()
    infer(fresh)
    assert symbol_names(fresh.graph, fresh.inputs).keys()
    assert len(set(symbol_names(fresh.graph, fresh.inputs).values())) == 8
    assert paged_inputs(done.cache) == done.inputs
