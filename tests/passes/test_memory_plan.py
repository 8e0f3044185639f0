"""The arena planner as arithmetic, and the memory plan of whole programs."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc.ir.interpret import interpret
from llmc.ir.paged import PagedSequence, allocate_caches, scatter_pages, step_inputs
from llmc.passes.base import PassContext
from llmc.passes.instruments import Verification
from llmc.passes.kv_layout import KvLayout
from llmc.passes.manager import run_passes
from llmc.passes.memory_plan import PlanMemory
from llmc.passes.paged_attention import PagedAttention
from llmc.spec.arena import ALIGNMENT_BYTES, Buffer, arena_bytes, live_bytes, place


@st.composite
def buffer_lists(draw):
    count = draw(st.integers(0, 30))
    buffers = []
    for index in range(count):
        first = draw(st.integers(0, 40))
        last = draw(st.integers(first, min(first + draw(st.integers(0, 40)), 80)))
        size = draw(st.integers(1, 5000))
        buffers.append(Buffer(value=str(index), size_bytes=size, first=first, last=last))
    return buffers


@given(buffer_lists())
def test_no_two_live_buffers_overlap(buffers):
    slots = place(buffers)
    assert {slot.value for slot in slots} == {buffer.value for buffer in buffers}
    for index, one in enumerate(slots):
        assert one.offset_bytes % ALIGNMENT_BYTES == 0
        for other in slots[index + 1 :]:
            together = one.first <= other.last and other.first <= one.last
            apart = (
                one.offset_bytes + one.size_bytes <= other.offset_bytes
                or other.offset_bytes + other.size_bytes <= one.offset_bytes
            )
            assert apart or not together


@given(buffer_lists())
def test_the_arena_lies_between_what_lives_at_once_and_everything(buffers):
    aligned = sum(-(-buffer.size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for buffer in buffers)
    assert live_bytes(buffers) <= arena_bytes(place(buffers)) <= aligned


@given(buffer_lists())
def test_the_plan_does_not_depend_on_the_order_of_buffers(buffers):
    assert place(buffers) == place(list(reversed(buffers)))


@given(buffer_lists())
def test_live_bytes_are_the_largest_sum_over_any_step(buffers):
    sums = [
        sum(buffer.size_bytes for buffer in buffers if buffer.first <= step <= buffer.last)
        for step in range(82)
    ]
    assert live_bytes(buffers) == max(sums)


def test_a_chain_takes_turns():
    chain = [Buffer(value=str(i), size_bytes=64, first=i, last=i + 1) for i in range(10)]
    assert arena_bytes(place(chain)) == 128


def test_the_smallest_gap_that_fits_is_taken():
    buffers = [
        Buffer(value="a", size_bytes=640, first=0, last=1),
        Buffer(value="keep1", size_bytes=512, first=0, last=9),
        Buffer(value="b", size_bytes=256, first=0, last=1),
        Buffer(value="keep2", size_bytes=192, first=0, last=9),
        Buffer(value="late", size_bytes=128, first=5, last=6),
    ]
    slots = {slot.value: slot for slot in place(buffers)}
    assert slots["late"].offset_bytes == slots["b"].offset_bytes


CONTEXT = PassContext(max_tokens=24, max_rows=6, max_model_len=64)


def planned(program, context=CONTEXT):
    passes = (KvLayout(page_tokens=4), PagedAttention(), PlanMemory())
    return run_passes(program, passes, context, [Verification()])


def test_the_plan_covers_what_a_run_allocates(toy):
    done = planned(toy())
    slots = {slot.value: slot for slot in done.memory.arena}
    pages = scatter_pages(done.cache, [4] * 6, seed=0)
    sequences = [
        PagedSequence(start=0, token_ids=[1, 2, 3, 4], block_tables=pages.tables[index], wanted=[3])
        for index in range(6)
    ]
    inputs = step_inputs(done.cache, sequences) | allocate_caches(done.cache, pages.num_pages)
    order = {node: index for index, node in enumerate(done.graph.nodes)}
    seen = {}

    def observe(node, value):
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or not value.numel():
            return
        storage = value.untyped_storage().data_ptr()
        if node.name in slots:
            slot = slots[node.name]
            assert slot.size_bytes == value.numel() * value.element_size()
            seen[node.name] = storage
        for user in node.users:
            owner = next(name for name, kept in reversed(seen.items()) if kept == storage)
            assert slots[owner].first <= order[node] < order[user] <= slots[owner].last

    interpret(done.graph, inputs, done.weights.evaluate, observe)
    assert set(seen) == set(slots)


def test_the_sums_are_what_the_program_stores(toy):
    program = toy()
    plan = planned(program).memory
    expected = sum(4 * prod(program.weights[name].shape) for name in program.weights)
    assert plan.weight_bytes == expected
    assert plan.cache_bytes_per_token == 2 * 2 * (8 + 8) * 4
    assert plan.activation_bytes < plan.activation_bytes_unshared / 4
    total = plan.weight_bytes + plan.activation_bytes + 100 * plan.cache_bytes_per_token
    assert plan.cache_tokens_within(total) == 100
    assert plan.cache_tokens_within(plan.weight_bytes) == 0


def test_activations_grow_with_the_tokens_of_a_step(toy):
    small = planned(toy()).memory
    large = planned(toy(), PassContext(max_tokens=48, max_rows=6, max_model_len=64)).memory
    assert large.weight_bytes == small.weight_bytes
    assert large.activation_bytes == pytest.approx(2 * small.activation_bytes, rel=0.1)


def test_several_results_of_one_operator_have_their_own_slots(toy):
    from llmc.passes.fuse_add_norm import FuseAddNorm

    passes = (FuseAddNorm(), KvLayout(page_tokens=4), PagedAttention(), PlanMemory())
    done = run_passes(toy(), passes, CONTEXT)
    names = {slot.value for slot in done.memory.arena}
    assert {"add_rms_norm.0", "add_rms_norm.1"} <= names
    lives = {slot.value: slot for slot in done.memory.arena}
    assert lives["add_rms_norm.1"].last > lives["add_rms_norm.0"].last
