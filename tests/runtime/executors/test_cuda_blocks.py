"""Where a program repeats itself: the repetition that saves most, and blocks that are of one kind only where
their calls take the same of each other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from llmc.runtime.executors.cuda_blocks import blocks_of, repetition  # noqa: E402
from llmc.runtime.executors.cuda_forms import Call  # noqa: E402


def saved(kinds):
    """What the best repetition saves, tried out one by one."""
    most = 0
    for period in range(1, len(kinds) // 2 + 1):
        for start in range(len(kinds)):
            rounds = 1
            unit = kinds[start : start + period]
            while kinds[start + rounds * period : start + (rounds + 1) * period] == unit:
                rounds += 1
            most = max(most, (rounds - 1) * len(unit))
    return most


@given(st.lists(st.integers(0, 2), max_size=24))
def test_the_repetition_is_one_and_saves_most(kinds):
    start, period, rounds = repetition(kinds)
    for index in range(rounds - 1):
        begin = start + index * period
        assert kinds[begin : begin + period] == kinds[begin + period : begin + 2 * period]
    assert start + period * rounds <= len(kinds)
    assert max(0, rounds - 1) * period == saved(kinds)


def calls_of(*given):
    """Calls of (kind, places that they take) at places 10, 11, …"""
    return [
        Call(place=10 + index, kind=kind, node=None, arguments=takes, varying=takes, constants={})
        for index, (kind, takes) in enumerate(given)
    ]


def numbered():
    known = {}
    return lambda shape: known.setdefault(shape, len(known))


def test_layers_are_blocks_of_one_kind_and_say_what_they_take_and_give():
    # An opening, three layers of two calls (each takes what the one before gave, and an input), an end.
    layers = [(1, (10, 0)), (2, (11, 10)), (1, (12, 0)), (2, (13, 12)), (1, (14, 0)), (2, (15, 14))]
    blocks = blocks_of(calls_of((0, (0,)), *layers, (3, (16,))), numbered())
    assert [len(block.calls) for block in blocks] == [1, 2, 2, 2, 1]
    assert len({block.kind for block in blocks[1:4]}) == 1
    assert len({block.kind for block in blocks}) == 3
    assert [block.takes for block in blocks] == [(0,), (10, 0), (12, 0), (14, 0), (16,)]
    assert [block.gives for block in blocks] == [(0,), (1,), (1,), (1,), ()]


def test_the_same_calls_that_take_something_else_are_another_kind():
    # The third layer's second call takes what the layer took, and not what its first call gave.
    layers = [(1, (10, 0)), (2, (11, 10)), (1, (12, 0)), (2, (13, 12)), (1, (14, 0)), (2, (14, 14))]
    blocks = blocks_of(calls_of((0, (0,)), *layers, (3, (16,))), numbered())
    assert blocks[1].kind == blocks[2].kind != blocks[3].kind
