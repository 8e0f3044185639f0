"""Choosing one option a unit within bytes: exactly the best of all choices, by trying them all."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.passes.quantize.knapsack import assign

OPTIONS = st.lists(
    st.tuples(st.integers(0, 60), st.floats(0, 10, allow_nan=False)), min_size=1, max_size=4, unique=True
)


def totals(units, chosen):
    parts = [unit[option] for unit, option in zip(units, chosen, strict=True)]
    return sum(size for size, _ in parts), sum(loss for _, loss in parts)


def every_choice(units, capacity):
    choices = itertools.product(*(range(len(unit)) for unit in units))
    return [found for chosen in choices if (found := totals(units, chosen))[0] <= capacity]


def split(units):
    return [[size for size, _ in unit] for unit in units], [[loss for _, loss in unit] for unit in units]


@given(st.lists(OPTIONS, max_size=5), st.integers(0, 300), st.integers(1, 7))
def test_the_choice_is_the_best_of_all_that_fit(units, capacity, factor):
    """Sizes with a common divisor too, and capacities between its multiples."""
    units = [[(size * factor, loss) for size, loss in unit] for unit in units]
    allowed = every_choice(units, capacity)
    if not allowed:
        with pytest.raises(ValueError, match="smallest options"):
            assign(*split(units), capacity)
        return
    found = assign(*split(units), capacity)
    size, loss = totals(units, found.options)
    assert found.exact
    assert size <= capacity
    assert loss == pytest.approx(min(loss for _, loss in allowed), abs=1e-9)


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(0, 300), st.integers(2, 9))
def test_coarse_steps_still_fit_and_lose_no_more_than_with_a_step_less_for_each_unit(units, spare, most_sums):
    capacity = sum(min(size for size, _ in unit) for unit in units) + spare
    found = assign(*split(units), capacity, most_sums)
    size, loss = totals(units, found.options)
    assert size <= capacity
    smaller = every_choice(units, capacity - found.step * (len(units) + 1))
    if smaller:
        assert loss <= min(loss for _, loss in smaller) + 1e-9


@given(st.lists(OPTIONS, min_size=1, max_size=5), st.integers(0, 300), st.floats(0, 20))
def test_no_more_is_spent_than_is_enough(units, spare, enough):
    capacity = sum(min(size for size, _ in unit) for unit in units) + spare
    found = assign(*split(units), capacity, enough=enough)
    size, loss = totals(units, found.options)
    allowed = every_choice(units, capacity)
    good = [other for other in allowed if other[1] <= enough - 1e-9]
    if good:
        assert loss <= enough + 1e-9
        assert size <= min(size for size, _ in good)
    elif min(loss for _, loss in allowed) > enough + 1e-9:
        assert loss == pytest.approx(min(loss for _, loss in allowed), abs=1e-9)


def test_of_equal_choices_the_smallest_is_taken():
    assert assign([[10, 4, 7]], [[1.0, 1.0, 1.0]], 100).options == (1,)
