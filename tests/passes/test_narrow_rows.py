"""Rows that nobody wants end with their keys and values: the graph, and numbers over any choice of rows."""

from __future__ import annotations

import random

import pytest
import torch
from torch import fx

from llmc.ir.interpret import interpret
from llmc.ir.paged import PagedSequence, allocate_caches, scatter_pages, step_inputs
from llmc.ir.printer import print_node, symbol_names
from llmc.passes.base import PassContext
from llmc.passes.fuse_add_norm import FuseAddNorm
from llmc.passes.fuse_rope_cache import FuseRopeCache
from llmc.passes.gather_early import gather_early
from llmc.passes.graph import calls
from llmc.passes.instruments import NumericContract, Verification
from llmc.passes.kv_layout import KvLayout
from llmc.passes.manager import run_passes
from llmc.passes.narrow_rows import NarrowRows, works_on_rows
from llmc.passes.paged_attention import PagedAttention
from llmc.spec.target import CUDA

ops, aten = torch.ops.llmc, torch.ops.aten
LENGTHS = (19, 1, 7)
VARIANTS = {
    "plain": {},
    "layer norms": {"norm": "layer_norm", "bias": True},
    "shared keys": {"kv_sources": (0, 0)},
    "mixture": {"experts": 4, "expert_bias": True},
    "bfloat16": {"dtype": torch.bfloat16},
}


def laid_out(program):
    passes = (FuseAddNorm(), KvLayout(page_tokens=4), PagedAttention(), FuseRopeCache())
    return run_passes(program, passes, PassContext())


def narrowed(program, expect=1):
    instruments = [Verification(), NumericContract()]
    return run_passes(program, (NarrowRows(expect=expect),), PassContext(), instruments)


def rows_of(program, draw, wanted):
    """Logits `{(sequence, position): row}` of what `wanted(draw, count)` chooses in each of a few mixed
    steps, and what the caches hold in the end."""
    texts = [[random.Random(5).randrange(61) for _ in range(length)] for length in LENGTHS]
    pages = scatter_pages(program.cache, LENGTHS, seed=5)
    caches = allocate_caches(program.cache, pages.num_pages)
    rows = {}
    for step in range(3):
        parts, owners = [], []
        for index, text in enumerate(texts):
            size = -(-len(text) // 3)
            if tokens := text[step * size : (step + 1) * size]:
                chosen = wanted(draw, len(tokens))
                owners += [(index, step * size + token) for token in chosen]
                table = pages.tables[index]
                start = step * size
                parts.append(PagedSequence(start=start, token_ids=tokens, block_tables=table, wanted=chosen))
        inputs = step_inputs(program.cache, parts)
        logits = interpret(program.graph, {**inputs, **caches}, program.weights.evaluate)
        assert len(logits) == len(owners)
        rows |= dict(zip(owners, logits, strict=True))
    return rows, caches


def test_the_last_layer_takes_wanted_rows_from_its_attention_on(toy, golden):
    done = narrowed(laid_out(toy(num_layers=1)))
    symbols = symbol_names(done.graph, done.inputs)
    golden("\n".join(print_node(node, symbols) for node in done.graph.nodes) + "\n", "narrowed.txt")
    (decision,) = done.history[-1].decisions
    assert decision.subject == "view_3 and what follows"
    assert "4 of them products" in decision.choice
    assert decision.reason.endswith("of all rows they read paged_attention, embedding")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "wanted",
    [
        lambda draw, count: [count - 1],
        lambda draw, count: range(count),
        lambda draw, count: sorted(draw.sample(range(count), draw.randint(0, count))),
        lambda draw, count: [],
    ],
    ids=["last", "all", "any", "none"],
)
def test_wanted_rows_are_what_they_were(toy, variant, wanted):
    before = laid_out(toy(**VARIANTS[variant]))
    done = narrowed(before)
    expected, caches = rows_of(before, random.Random(1), wanted)
    found, narrow_caches = rows_of(done, random.Random(1), wanted)
    assert found.keys() == expected.keys()
    tolerance = 0.02 if variant == "bfloat16" else 2e-6  # a library's bits depend on how many rows there are
    for owner, row in found.items():
        assert (row - expected[owner]).abs().max() <= tolerance * expected[owner].abs().max(), owner
    for name, cache in narrow_caches.items():
        assert torch.equal(cache, caches[name]), name


def test_what_mixes_rows_keeps_all_of_them(toy):
    """A product behind a sum over tokens needs every token, and so does what is before it."""
    program = laid_out(toy(num_layers=1))
    graph = program.copy_graph()
    last = calls(graph, ops.linear.default)[-2]
    with graph.inserting_after(last):
        total = graph.call_function(aten.cumsum.default, (last, 0))
    last.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    done = narrowed(program.replace(graph=graph), expect=0)
    assert done.history[-1].matches == 0
    assert done.history[-1].misses == ("no product stands between the last attention and the choice of rows",)
    assert print_all(done) == print_all(run_passes(program.replace(graph=graph), (), PassContext()))


def test_the_last_sum_joins_its_norm(toy):
    """Where the choice of rows stood between them, as canonicalisation leaves it."""
    program = toy(num_layers=1)
    graph = program.copy_graph()
    gather_early(graph)
    before = laid_out(program.replace(graph=graph))
    assert [node.target for node in before.graph.nodes].count(ops.add_rms_norm.default) == 1
    done = narrowed(before)
    assert [node.target for node in done.graph.nodes].count(ops.add_rms_norm.default) == 2
    assert ops.rms_norm.default not in [node.target for node in list(done.graph.nodes)[-12:]]


def test_targets_whose_steps_have_as_many_rows_everywhere_keep_them(toy):
    before = laid_out(toy(num_layers=1))
    done = run_passes(before, (NarrowRows(),), PassContext(target=CUDA))
    assert done.history[-1].misses == (f"target {CUDA.name}",)
    assert print_all(done) == print_all(before)


def print_all(program):
    symbols = symbol_names(program.graph, program.inputs)
    return [print_node(node, symbols) for node in program.graph.nodes]


def test_another_choice_of_rows_is_left_alone(toy):
    """Rows that are gathered by anything but the wanted ones are read of all."""
    program = laid_out(toy(num_layers=1))
    graph = program.copy_graph()
    positions = next(node for node in graph.nodes if node.target == "positions")
    (gather,) = calls(graph, ops.gather_rows.default)
    with graph.inserting_before(gather):
        other = graph.call_function(ops.gather_rows.default, (gather.args[0], positions))
        same = graph.call_function(ops.gather_rows.default, (other, gather.args[1]))
    gather.replace_all_uses_with(same)
    graph.erase_node(gather)
    done = run_passes(program.replace(graph=graph), (NarrowRows(),), PassContext(), [Verification()])
    assert done.history[-1].matches == 0


T = 5
CASES = {
    "sum over columns": (aten.sum.dim_IntList, ["x", [-1], True], True),
    "sum over rows": (aten.sum.dim_IntList, ["x", [0, 1], True], False),
    "sum of all": (aten.sum.default, ["x"], False),
    "largest of a row": (aten.topk.default, ["x", 2, -1], True),
    "largest of a column": (aten.topk.default, ["x", 2, 0], False),
    "columns side by side": (aten.cat.default, [["x", "y"], 1], True),
    "rows below each other": (aten.cat.default, [["x", "y"], 0], False),
    "a slice of columns": (aten.slice.Tensor, ["x", 1, 0, 2], True),
    "a slice of rows": (aten.slice.Tensor, ["x", 0, 0, 2], False),
    "heads of a row": (aten.reshape.default, ["x", [-1, 2, 3]], True),
    "rows in pairs": (aten.reshape.default, ["x", [2, -1]], False),
    "a dimension behind": (aten.unsqueeze.default, ["x", -1], True),
    "a dimension in front": (aten.unsqueeze.default, ["x", 0], False),
    "columns swapped": (aten.transpose.int, ["z", 1, 2], True),
    "rows swapped": (aten.transpose.int, ["z", 0, 1], False),
    "columns permuted": (aten.permute.default, ["z", [0, 2, 1]], True),
    "rows permuted": (aten.permute.default, ["z", [1, 0, 2]], False),
    "a sum of equals": (aten.add.Tensor, ["x", "y"], True),
    "a vector by rows": (aten.add.Tensor, ["x", "vector"], False),
    "a weight by columns": (aten.mul.Tensor, ["x", "weight"], True),
    "a weight of all": (aten.mul.Tensor, ["x", "matrix"], False),
    "a product": (ops.linear.default, ["x", "matrix", None], True),
    "rows in another order": (aten.flip.default, ["x", [0]], False),
}


@pytest.mark.parametrize("case", CASES)
def test_operators_that_work_on_rows_are_known(case):
    target, args, expected = CASES[case]
    graph = fx.Graph()
    shapes = {"x": (T, 6), "y": (T, 6), "z": (T, 2, 3), "vector": (6,)}
    made = {name: graph.placeholder(name) for name in shapes}
    shapes |= {"weight": (6,), "matrix": (T, 6)}
    made |= {name: graph.create_node("get_attr", name) for name in ("weight", "matrix")}
    values = {name: torch.rand(shape) for name, shape in shapes.items()}
    for name, node in made.items():
        node.meta["val"] = values[name]

    def lookup(arg, table):
        if isinstance(arg, list):
            return [lookup(one, table) for one in arg]
        return table[arg] if isinstance(arg, str) else arg

    call = graph.call_function(target, tuple(lookup(arg, made) for arg in args))
    call.meta["val"] = target(*(lookup(arg, values) for arg in args))
    assert works_on_rows(call) is expected
    if not expected or not isinstance(call.meta["val"], torch.Tensor):
        return
    # What is said to work on rows gives the same rows of fewer.
    some = torch.tensor([3, 1])
    fewer = {name: value[some] if name in ("x", "y", "z") else value for name, value in values.items()}
    found = target(*(lookup(arg, fewer) for arg in args))
    torch.testing.assert_close(found, call.meta["val"][some])
