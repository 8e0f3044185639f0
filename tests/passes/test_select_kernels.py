"""Which products take 8-bit inputs: all, none, or those that lose little; and what each should take."""

from __future__ import annotations

import pytest
import torch

from llmc.kernels.catalog import MEASURED, integer_linear, integer_seconds
from llmc.passes.base import PassContext
from llmc.passes.graph import argument, calls
from llmc.passes.instruments import NumericContract, Verification
from llmc.passes.kv_layout import KvLayout
from llmc.passes.manager import run_passes
from llmc.passes.paged_attention import PagedAttention
from llmc.passes.probe import logits_of, probe_sequences
from llmc.passes.quantize.rtn import Rtn
from llmc.passes.select_kernels import SelectKernels
from llmc.spec.errors import RecipeError
from llmc.spec.history import is_invariant
from llmc.spec.quant import parse_scheme
from llmc.spec.target import CPU, REFERENCE, parse_target

QUANTIZED_LINEAR = torch.ops.llmc.quantized_linear.default


@pytest.fixture
def quantized(toy):
    """A paged program of int4 products, ready for the plan stage."""
    passes = (Rtn(bits=4, group_size=32, expect=1), KvLayout(), PagedAttention())
    return run_passes(toy(hidden=64, ffn=96, head_dim=16), passes, PassContext(target=CPU))


def select(program, target=CPU, **options):
    instruments = [Verification(), NumericContract()]
    return run_passes(program, (SelectKernels(**options),), PassContext(target=target), instruments)


def activations(program):
    return {node.name: argument(node, "activation") for node in calls(program.graph, QUANTIZED_LINEAR)}


def test_accurate_products_stay_and_say_what_they_cost(quantized):
    done = select(quantized)
    assert set(activations(done).values()) == {""}
    record = done.history[-1]
    assert len(record.decisions) == record.matches == len(activations(done)) > 0
    assert all("int16_g32" in decision.choice for decision in record.decisions)
    assert all("instead of int8_g32" in decision.reason for decision in record.decisions)
    assert record.divergence == 0


def test_fast_products_round_their_inputs_to_8_bits(quantized):
    done = select(quantized, inputs="fast")
    assert set(activations(done).values()) == {"int8_g32"}
    assert done.history[-1].divergence > 0
    assert set(activations(quantized).values()) == {""}, "the program given must not change"


def test_auto_measures_each_product_and_keeps_the_promise(quantized):
    tight, loose = (
        select(quantized, inputs="auto", max_error=0.0),
        select(quantized, inputs="auto", max_error=1.0),
    )
    assert set(activations(tight).values()) == {""}
    assert set(activations(loose).values()) == {"int8_g32"}
    errors = sorted(error.error**0.5 for error in tight.history[-1].errors)
    assert 0 < errors[0] <= errors[-1] < 0.05
    middle = (errors[0] + errors[-1]) / 2
    mixed = select(quantized, inputs="auto", max_error=middle)
    fast = {name for name, activation in activations(mixed).items() if activation}
    losses = {error.subject: error.error**0.5 for error in mixed.history[-1].errors}
    assert fast == {name for name, error in losses.items() if error <= middle}
    sequences = probe_sequences(quantized.spec, 0)
    exact = logits_of(quantized, sequences)
    whole = (logits_of(loose, sequences) - exact).norm()
    assert 0 < (logits_of(mixed, sequences) - exact).norm() < 2 * whole


def test_planning_evaluates_no_weight(quantized):
    context = PassContext(target=CPU, planning=True)
    done = run_passes(quantized, (SelectKernels(inputs="auto"),), context)
    assert set(activations(done).values()) == {""}
    assert not done.history[-1].errors


def test_other_targets_and_chosen_products_are_left_alone(quantized):
    done = select(quantized, target=REFERENCE, inputs="fast")
    assert set(activations(done).values()) == {""}
    assert done.history[-1].misses == ("target reference",)
    again = select(select(quantized, inputs="fast"), inputs="accurate")
    assert set(activations(again).values()) == {"int8_g32"}
    assert all("chose int8_g32" in miss for miss in again.history[-1].misses)


@pytest.mark.parametrize("scheme", ["int4_g32", "int4_g128", "int8_g32"])
def test_one_row_waits_for_memory_and_a_batch_for_multipliers(scheme):
    fast, accurate = (integer_linear(parse_scheme(scheme), limbs=limbs) for limbs in (1, 2))
    num_bytes = fast.layout.num_bytes(4096, 2048)
    for kernel in (fast, accurate):
        assert integer_seconds(kernel, 4096, 2048, 1) == pytest.approx(num_bytes / MEASURED.stream_bytes)
    ratio = integer_seconds(accurate, 4096, 2048, 512) / integer_seconds(fast, 4096, 2048, 512)
    assert 1.7 < ratio < 2.0, "two limbs are twice the products, and share the scaling of their sums"


def test_rows_may_depend_on_their_batch_where_a_library_is_faster(toy):
    paged = run_passes(toy(), (KvLayout(), PagedAttention()), PassContext(target=parse_target("cuda:sm_90")))
    done = select(paged, parse_target("cuda:sm_90"), invariant=False)
    record = done.history[-1]
    assert (
        record.matches == len(calls(done.graph, torch.ops.llmc.linear.default)) == len(record.decisions) > 0
    )
    assert {decision.choice for decision in record.decisions} == {"torch, above 64 rows"}
    assert not is_invariant(done.history)
    assert is_invariant(paged.history)
    assert is_invariant(select(paged, parse_target("cuda:sm_90")).history)
    with pytest.raises(RecipeError, match="invariant cannot be false for the target cpu"):
        select(paged, invariant=False)
