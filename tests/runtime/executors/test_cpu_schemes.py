"""Generated code multiplies codes of every scheme as the reference operators do, in any batch."""

from __future__ import annotations

import operator
import shutil

import numpy as np
import pytest
import torch

from llmc.artifact.cpu import CpuUnit, PackedWeight
from llmc.codegen.cpu.backend import cpu_weights
from llmc.codegen.cpu.packed import unpacked
from llmc.codegen.cpu.source import ABI_VERSION, MAX_THREADS, generate
from llmc.codegen.cpu.toolchain import compile_library, find_compiler
from llmc.ir.infer import infer
from llmc.ir.interpret import interpret
from llmc.ir.paged import allocate_caches, paged_inputs, step_inputs
from llmc.ir.program import Program
from llmc.ir.verify import verify
from llmc.ir.weights import Constant, Quantized, WeightStore
from llmc.kernels.levels import supported_levels
from llmc.kernels.packing import has_layout
from llmc.runtime.executors.cpu import processor_features
from llmc.runtime.executors.cpu_model import CpuModel
from llmc.runtime.executors.tiles import SequencePart
from llmc.spec.cache import CacheLayout
from llmc.spec.errors import TargetError
from llmc.spec.model import ModelSpec
from llmc.spec.quant import parse_scheme

llmc_ops = torch.ops.llmc
aten = torch.ops.aten
pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(
        not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
    ),
]
WIDTH, ROWS = 152, 45
INTEGER = ("int4_g32", "int4_g128_asym", "int3_g64", "int8_channel", "int8_g32_asym", "int4_channel_asym")
TABLE = (
    *(
        "nf4_g64",
        "nf4_channel",
        "fp4_g32_se8m0",
        "fp8_channel",
        "fp8_g32",
        "fp8_b16x32",
        "fp8_b128x128_sbf16",
    ),
    *("int4_g48", "int4_g5", "int3_g20_asym", "int8_g16", "int4_g32_sf32", "int8_g32_asym_sbf16"),
)
ACTIVATIONS = {
    "int4_g128": ("int8_token", "int8_g32", "int16_g64"),
    "int8_g32_asym": ("int8_token", "int8_g128"),
}
EXPERTS = (
    ("int4_g32", ""),
    ("nf4_g64", ""),
    ("fp8_channel", ""),
    ("int8_channel", "int8_token"),
    ("int4_g32_asym", "int8_g32"),
)


class Probe:
    """A graph of one product a case over the same embedded tokens, their results side by side."""

    def __init__(self, builder):
        self.b = builder
        self.parts = []
        self.cases = []
        table = builder.weight("table", 61, WIDTH)
        embedded = builder.call(llmc_ops.embedding.default, builder.inputs["input_ids"], table)
        self.x = builder.call(llmc_ops.gather_rows.default, embedded, builder.inputs["out_rows"])

    def stored(self, name, size, scheme_name):
        scheme = parse_scheme(scheme_name)
        dense = Constant(self.b.values(name, size))
        parts = ["codes", "scales"] + ([] if scheme.symmetric else ["zeros"])
        read = [self.b.read(f"{name}.{part}", Quantized(dense, scheme, part)) for part in parts]
        return read + [None] * (3 - len(read))

    def add(self, label, node, width):
        self.parts.append(node)
        self.cases.append((label, width))

    def product(self, scheme, activation=""):
        name = f"w_{scheme}_{activation}"
        stored = self.stored(name, (ROWS, WIDTH), scheme)
        bias = self.b.weight(f"{name}_bias", ROWS)
        out = self.b.call(llmc_ops.quantized_linear.default, self.x, *stored, bias, scheme, activation)
        self.add((scheme, activation), out, ROWS)

    def lookup(self, scheme):
        stored = self.stored(f"e_{scheme}", (61, WIDTH), scheme)
        ids = self.b.inputs["input_ids"]
        found = self.b.call(llmc_ops.quantized_embedding.default, ids, *stored, scheme, WIDTH, "float32")
        self.add(
            (scheme, "lookup"),
            self.b.call(llmc_ops.gather_rows.default, found, self.b.inputs["out_rows"]),
            WIDTH,
        )

    def experts(self, scheme, activation, kind, interleaved):
        name = f"m_{scheme}_{activation}_{kind.replace(':', '_')}"
        router = self.b.call(aten.mm.default, self.x, self.b.weight(f"{name}_router", WIDTH, 5))
        top = self.b.call(aten.topk.default, self.b.call(aten._softmax.default, router, -1, False), 2)
        chosen, ids = (self.b.graph.call_function(operator.getitem, (top, index)) for index in range(2))
        columns = 1 if kind.startswith("plain:") else 2
        gate_up = self.stored(f"{name}_up", (5, columns * 72, WIDTH), scheme)
        down = self.stored(f"{name}_down", (5, WIDTH, 72), scheme)
        biases = [self.b.weight(f"{name}_b{i}", 5, size) for i, size in enumerate((columns * 72, WIDTH))]
        out = self.b.call(
            llmc_ops.quantized_moe.default, self.x, ids, chosen, *gate_up, *down, *biases, kind, interleaved,
            1.7, 7.0, scheme, scheme, activation,
        )  # fmt: skip
        self.add((scheme, activation, kind), out, WIDTH)

    def program(self) -> Program:
        self.b.graph.output(self.b.call(aten.cat.default, self.parts, -1))
        layout = CacheLayout(groups=self.b.layout.groups)
        total = sum(width for _, width in self.cases)
        spec = ModelSpec(
            family="toy", architecture="ToyForCausalLM", num_layers=1, hidden_size=WIDTH, vocab_size=total,
            max_context=160, compute_dtype="float32", tied_head=True, num_parameters=1, eos_token_ids=(0,),
            bos_token_ids=(0,), attention=(),
        )  # fmt: skip
        program = Program(
            graph=self.b.graph, inputs=paged_inputs(layout), weights=WeightStore(self.b.entries), spec=spec,
            cache=layout, facts=frozenset({"paged"}),
        )  # fmt: skip
        infer(program)
        verify(program)
        return program


def model_of(program, folder, level):
    source = generate(program, max_tokens=64, max_logit_rows=64)
    library = folder / f"{level.name}.so"
    library.write_bytes(compile_library(find_compiler(), source.text, level))
    store = cpu_weights(program.weights, source)
    weights = [
        store.evaluate(slot.stored_name).contiguous().reshape(-1).view(torch.uint8).numpy()
        for slot in source.weight_slots
    ]
    unit = CpuUnit(
        abi_version=ABI_VERSION, max_tokens=64, max_logit_rows=64, max_threads=MAX_THREADS,
        arena_bytes=source.arena_bytes, weights=(), packed=(), levels=(), compiler="",
    )  # fmt: skip
    pages = tuple(8 for _ in program.cache.groups)
    return CpuModel(library, unit, weights, program.cache, pages, program.spec.vocab_size, num_threads=2)


def logits_of(model, ids):
    part = SequencePart(start=0, token_ids=ids, block_tables=[list(range(8))], wanted=range(len(ids)))
    (tile,) = model.run([part])
    return tile.logits.copy()


@pytest.fixture(scope="module")
def probe(new_builder):
    made = Probe(new_builder(hidden=WIDTH, windows=(0,), page_tokens=16))
    for scheme in (*INTEGER, *TABLE):
        made.product(scheme)
    for scheme, activations in ACTIVATIONS.items():
        for activation in activations:
            made.product(scheme, activation)
    for scheme in ("int3_g64", "nf4_g64", "fp8_b16x32", "int4_g5", "int8_g32_asym_sbf16"):
        made.lookup(scheme)
    for scheme, activation in EXPERTS:
        made.experts(scheme, activation, "silu", False)
    made.experts("int4_g128", "", "clamped_swiglu", True)
    made.experts("nf4_channel", "", "plain:relu2", False)
    return made, made.program()


def test_every_scheme_agrees_with_the_reference_in_any_batch(probe, tmp_path):
    made, program = probe
    rng = np.random.default_rng()
    ids = [int(i) for i in rng.integers(0, 61, 40)]
    caches = allocate_caches(program.cache, [8])
    part = SequencePart(start=0, token_ids=ids, block_tables=[list(range(8))], wanted=range(len(ids)))
    values = {}

    def weight(name):
        if name not in values:
            values[name] = program.weights.evaluate(name)
        return values[name]

    want = interpret(program.graph, step_inputs(program.cache, [part]) | caches, weight).numpy()
    model = model_of(program, tmp_path, supported_levels(processor_features())[-1])
    got = logits_of(model, ids)
    start = 0
    for label, width in made.cases:
        ours, theirs = got[:, start : start + width], want[:, start : start + width]
        start += width
        scale = np.abs(theirs).max()
        rounded = has_layout(parse_scheme(label[0])) and label[1] != "lookup"
        assert np.abs(ours - theirs).max() <= (3e-4 if rounded else 2e-5) * scale, label
    for count in (1, 3, 7, 17):
        np.testing.assert_array_equal(logits_of(model, ids[:count]), got[:count])
    model.close()


@pytest.mark.slow
def test_every_level_gives_the_same_bits_for_every_scheme(probe, tmp_path):
    _, program = probe
    ids = [int(i) for i in np.random.default_rng().integers(0, 61, 23)]
    results = []
    for level in supported_levels(processor_features()):
        model = model_of(program, tmp_path, level)
        results.append(logits_of(model, ids))
        model.close()
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_packed_weights_give_back_what_they_replace(probe):
    _, program = probe
    source = generate(program, max_tokens=64, max_logit_rows=64)
    store = cpu_weights(program.weights, source)
    checked = 0
    for slot in source.weight_slots:
        if not isinstance(slot.packed, PackedWeight):
            continue
        for name, expr in unpacked(slot.packed, store[slot.stored_name]).items():
            original = program.weights.evaluate(name)
            again = expr.evaluate(store.reader)
            assert again.dtype == original.dtype
            assert again.shape == original.shape
            assert torch.equal(again.view(torch.uint8), original.contiguous().view(torch.uint8)), name
            checked += 1
    assert checked > 60


@pytest.mark.parametrize(
    ("scheme", "activation", "said"),
    [
        ("int4_g32", "fp8_token", "takes? int8 and int16"),
        ("nf4_g64", "int8_token", "in float32"),
        ("int4_g32", "int8_g48", "groups of 48"),
    ],
)
def test_activations_that_no_kernel_rounds_are_refused(new_builder, scheme, activation, said):
    made = Probe(new_builder(hidden=WIDTH, windows=(0,), page_tokens=16))
    made.product(scheme, activation)
    with pytest.raises(TargetError, match=said):
        generate(made.program(), max_tokens=8, max_logit_rows=8)


def test_int8_caches_hold_what_the_reference_holds(build_program, tmp_path):
    """Attention over int8 keys and values with scales, chunked and shared between steps."""
    shape = {"hidden": 40, "windows": (0, 24), "page_tokens": 16}
    program = build_program(cache_dtype="int8", **shape)
    assert all(group.scales for group in program.cache.groups)
    caches = allocate_caches(program.cache, [8] * len(program.cache.groups))
    model = model_of(program, tmp_path, supported_levels(processor_features())[-1])
    values = {}

    def weight(name):
        if name not in values:
            values[name] = program.weights.evaluate(name)
        return values[name]

    rng = np.random.default_rng()
    ids = [int(i) for i in rng.integers(0, 97, 70)]
    tables = [list(range(8))] * len(program.cache.groups)
    done = 0
    for count in (5, 1, 30, 1, 1, 32):
        part = SequencePart(
            start=done, token_ids=ids[done : done + count], block_tables=tables, wanted=range(count)
        )
        want = interpret(program.graph, step_inputs(program.cache, [part]) | caches, weight).numpy()
        (tile,) = model.run([part])
        error = np.abs(tile.logits - want) / np.abs(want).max()
        # A value near the middle of two codes may round either way: a step of 1/127 in what some rows read.
        assert error.max() <= 1e-2
        assert error.mean() <= 2e-3
        done += count
    model.close()
