"""The shipped table of variants: it has an entry for what real models ask, each entry is what its basis says
and compiles as it stands, and what it does not know the model chooses, which the choice says."""

from __future__ import annotations

import json

import pytest
import torch

from llmc.codegen.cuda.assemble import assemble
from llmc.kernels.cuda.operators import CudaOperators
from llmc.kernels.cuda.products import rows_of_program
from llmc.kernels.cuda.variant_table import TABLE, Choices, newest, read_table, shipped_table
from llmc.kernels.cuda.variants import ProductClass, Variant, modelled
from llmc.spec.target import CUDA_ARCHITECTURES

# Hidden and intermediate widths, vocabulary, heads of queries and of keys, and their width.
MODELS = {
    "qwen2.5-0.5b": (896, 4864, 151936, 14, 2, 64),
    "llama-3.2-1b": (2048, 8192, 128256, 32, 8, 64),
    "llama-3.1-8b": (4096, 14336, 128256, 32, 8, 128),
}
SCHEMES = ["dense", "int4_g32", "int4_g128", "int4_g32_asym", "int8_channel", "int8_g32", "fp8_channel"]
ROWS = (1, 32, 64, 500)


def shapes_of(hidden, intermediate, vocab, heads, kv_heads, width):
    """The matrices of a layer, and the head."""
    yield (heads + 2 * kv_heads) * width, hidden
    yield hidden, heads * width
    yield 2 * intermediate, hidden
    yield hidden, intermediate
    yield vocab, hidden


def weight_of(scheme, n, k):
    """A weight without data, as `CudaOperators.product` takes it."""
    if scheme == "dense":
        return torch.empty(n, k, dtype=torch.bfloat16), None
    kind, group, *_ = scheme.split("_")
    groups = 1 if group == "channel" else -(-k // int(group[1:]))
    scales = torch.empty(n, groups, dtype=torch.float16)
    zeros = torch.empty(n, groups, dtype=torch.uint8) if "asym" in scheme else None
    if kind == "int4":
        return torch.empty(n, -(-k // 128) * 16, dtype=torch.int32), scales, zeros, None, scheme
    dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    return torch.empty(n, k, dtype=dtype), scales, None, None, scheme


def asked(choose, scheme, n, k, rows):
    """What a product launches."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    found = []
    with FakeTensorMode():
        operators = CudaOperators(lambda launch: found.append(launch.specialisation), choose=choose)
        operators.product(torch.empty(rows, k, dtype=torch.bfloat16), weight_of(scheme, n, k), None, "", None)
    return found[-1]


@pytest.mark.parametrize("model", MODELS)
def test_every_product_of_a_real_model_has_an_entry(model):
    wanted = {}

    def choose(each):
        wanted[each.name] = each
        return modelled(each)

    for scheme in SCHEMES:
        for n, k in shapes_of(*MODELS[model]):
            for rows in ROWS:
                asked(choose, scheme, n, k, rows)
    # Of words in groups of 32, programs take 64 rows at most.
    fewer = sum(each.startswith("int4_g32") for each in SCHEMES)
    assert len(wanted) == 5 * (len(SCHEMES) * len(ROWS) - fewer)
    for architecture in CUDA_ARCHITECTURES:
        choices = Choices(architecture)
        for each in wanted.values():
            choices(each)
        assert {each.reason for each in choices.taken.values()} == {
            "table: by the budget of instructions, not measured on a device"
        }


def product(**changed):
    known = {"kernel": "linear.linear_words", "scheme": "int4_g32", "n": 4096, "k": 4096, "rows": 16}
    return ProductClass(**(known | changed))


@pytest.mark.parametrize(
    ("changed", "architecture", "unknown"),
    [
        ({"scheme": "int2_g32"}, "sm_90", "sm_90, linear.linear_words, int2_g32, wide parts, 16 rows"),
        ({}, "sm_120", "sm_120, linear.linear_words, int4_g32, wide parts, 16 rows"),
        ({"rows": 256}, "sm_80", "sm_80, linear.linear_words, int4_g32, wide parts, 256 rows"),
    ],
)
def test_what_the_table_does_not_know_the_model_chooses_and_says_so(changed, architecture, unknown):
    choices = Choices(architecture)
    assert choices(product(**changed)) == modelled(product(**changed))
    (taken,) = choices.taken.values()
    assert taken.reason == f"model: the table has no entry for {unknown}"


def test_what_was_measured_goes_before_the_table():
    fast = Variant(columns=64, warps=8, stages=5)
    choices = Choices("sm_90", {product().name: fast}, "a GPU")
    assert choices(product()) == fast
    assert choices(product(n=2048)) == shipped_table().choice(product(n=2048), "sm_90").variant
    assert [each.reason.partition(":")[0] for each in choices.taken.values()] == [
        "measured on a GPU",
        "table",
    ]


def test_an_entry_of_the_file_is_taken_for_what_it_names_alone():
    entry = {"architectures": ["sm_90"], "kernel": "k", "schemes": ["int4_g32*"], "shapes": ["wide *"]}
    entry |= {"rows": [16], "columns": 128, "warps": 8, "stages": 2, "basis": "measured"}
    table = read_table({"bases": {"measured": "on a GPU"}, "entries": [entry]})
    own = product(kernel="k", scheme="int4_g32_asym", n=1 << 20)
    assert table.choice(own, "sm_90").variant == Variant(columns=128, warps=8, stages=2)
    assert table.choice(own, "sm_90").reason == "table: on a GPU"
    others = [("sm_80", {}), ("sm_90", {"rows": 32}), ("sm_90", {"scheme": "int4_g64"}), ("sm_90", {"n": 64})]
    for architecture, changed in others:
        known = {"kernel": "k", "scheme": "int4_g32", "n": 1 << 20, "rows": 16} | changed
        assert table.choice(product(**known), architecture).reason.startswith("model")


def test_an_artifact_for_several_architectures_takes_the_entries_of_the_newest():
    assert newest(("sm_90", "sm_100", "sm_80")) == "sm_100"


def examples(entry):
    """Products that an entry covers, one of each kind of scheme and shape that it names."""
    shapes = [(28672, 4096), (4096, 4096), (1152, 896), (3072, 2048), (512, 256), (128256, 256)]
    for scheme in SCHEMES:
        for n, k in shapes:
            for rows in entry.rows:
                each = ProductClass(kernel=entry.kernel, scheme=scheme, n=n, k=k, rows=rows)
                if entry.covers(each, entry.architectures[0]):
                    yield each


def test_no_entry_is_covered_by_others_or_covers_nothing():
    table = shipped_table()
    assert {each.basis for each in table.entries} == set(table.bases) == {"model"}
    used = set()
    for entry in table.entries:
        found = list(examples(entry))
        assert found, entry
        for each in found:
            first = next(e for e in table.entries if e.covers(each, entry.architectures[0]))
            used.add(table.entries.index(first))
    assert used == set(range(len(table.entries)))
    assert len(json.loads(TABLE.read_text())["entries"]) == len(table.entries)


@pytest.mark.parametrize("architecture", CUDA_ARCHITECTURES)
def test_entries_that_were_not_measured_are_what_the_model_says(architecture):
    for entry in shipped_table().entries:
        if entry.basis == "model" and architecture in entry.architectures:
            for each in examples(entry):
                assert entry.variant == modelled(each)


def demand(product):
    """Which of an entry's products takes most registers and memory: rows, then groups at once."""
    return rows_of_program(product.rows, product.scheme), "g32" in product.scheme


@pytest.mark.slow
@pytest.mark.parametrize("architecture", CUDA_ARCHITECTURES)
def test_entries_compile_with_as_many_loads_ahead_as_memory_holds(architecture):
    wanted = []
    for entry in shipped_table().entries:
        if architecture in entry.architectures:
            each = max(examples(entry), key=demand)
            taken = shipped_table().choice(each, architecture).variant
            rows = max(1, each.rows // 2 + 1)
            wanted.append(asked(lambda product, v=taken: v, each.scheme, each.n, each.k, rows))
    for specialisation, machine in zip(
        wanted, assemble([(each, architecture) for each in wanted]), strict=True
    ):
        assert 2 <= machine.stages <= specialisation.stages, specialisation
        assert machine.stack_bytes == 0, (specialisation, machine.stack_bytes)
