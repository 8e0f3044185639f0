"""The plan of recorded steps: what the pass says of a program, which sizes, and what it leaves alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.ir.printer import print_program
from llmc.passes.base import PassContext
from llmc.passes.cuda_graph import CudaGraph, batch_sizes
from llmc.passes.kv_layout import KvLayout
from llmc.passes.manager import run_passes
from llmc.passes.paged_attention import PagedAttention
from llmc.spec.target import parse_target


def planned(toy, target="cuda", **options):
    context = PassContext(target=parse_target(target))
    laid_out = run_passes(toy(), (KvLayout(), PagedAttention()), context)
    return laid_out, run_passes(laid_out, (CudaGraph(**options),), context)


def test_the_plan_names_sizes_and_what_is_recorded_at_load(toy):
    before, after = planned(toy, max_rows=200)
    assert print_program(after) == print_program(before)
    plan = after.capture
    assert plan.decode_rows == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 200)
    assert plan.at_load == plan.decode_rows
    assert 0 < plan.seconds <= 1.0
    targets = [str(node.target) for node in before.graph.nodes]
    attention = 2 * sum(len(group.layers) for group in before.cache.groups)
    assert plan.num_launches > sum("linear" in target for target in targets) + attention
    (record,) = [each for each in after.history if each.name == "cuda_graph"]
    assert record.matches == len(plan.decode_rows)


def test_reading_keys_again_may_take_as_long_as_launching_a_step(toy):
    before, after = planned(toy, max_rows=1)
    plan = after.capture
    read_s = plan.keys_read_again * before.cache.bytes_per_token / 2e12
    assert read_s == pytest.approx(plan.num_launches * 6e-6, rel=0.01)
    _, never = planned(toy, load_seconds=0.0)
    assert never.capture.keys_read_again == plan.keys_read_again


def test_what_does_not_fit_the_time_is_recorded_later(toy):
    _, after = planned(toy, load_seconds=0.02)
    assert 0 < len(after.capture.at_load) < len(after.capture.decode_rows)
    assert after.capture.at_load == after.capture.decode_rows[: len(after.capture.at_load)]
    assert after.capture.seconds <= 0.02
    _, never = planned(toy, load_seconds=0.0)
    assert never.capture.at_load == ()


def test_other_targets_are_left_alone(toy):
    _, after = planned(toy, "cpu")
    assert after.capture is None


@given(st.integers(1, 1024))
def test_sizes_ascend_to_the_most_and_waste_little(most):
    sizes = batch_sizes(most)
    assert sizes[-1] == most
    assert list(sizes) == sorted(set(sizes))
    for rows in range(1, most + 1):
        filled = next(size for size in sizes if size >= rows)
        assert filled - rows < max(8, 64 if rows > 128 else rows)
