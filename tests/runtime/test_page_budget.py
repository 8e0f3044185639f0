"""Pages per cache group: whole sequences fit, bytes are kept, too little is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmc.runtime.memory import available_memory_bytes
from llmc.runtime.page_budget import DEFAULT_SHARE, CacheDemand, bytes_of, num_pages
from llmc.spec.cache import CacheGroup, CacheLayout
from llmc.spec.errors import TargetError

pytestmark = pytest.mark.pure


def layout_of(*groups):
    return CacheLayout(
        groups=tuple(
            CacheGroup(
                layers=tuple(range(layers)), kind="window" if window else "full", window=window,
                num_kv_heads=2, k_dim=8, v_dim=8, dtype="float32", page_tokens=page_tokens,
            )
            for layers, window, page_tokens in groups
        )
    )  # fmt: skip


layouts = st.lists(
    st.tuples(st.integers(1, 4), st.sampled_from([0, 0, 5, 64]), st.sampled_from([1, 8, 32])),
    min_size=1,
    max_size=3,
).map(lambda groups: layout_of(*groups))
demands = st.builds(
    CacheDemand,
    max_requests=st.integers(1, 9),
    max_model_len=st.integers(1, 500),
    max_step_tokens=st.integers(9, 200),
)


@given(layouts, demands, st.integers(1, 2**22))
def test_stated_bytes_are_never_exceeded_and_shared_fairly(layout, demand, cache_bytes):
    one = demand.pages_per_sequence(layout)
    try:
        pages = num_pages(layout, demand, cache_bytes, 0)
    except TargetError:
        assert cache_bytes < bytes_of(layout, one)
        return
    assert bytes_of(layout, pages) <= cache_bytes
    sequences = cache_bytes // bytes_of(layout, one)
    assert all(have >= sequences * need for have, need in zip(pages, one, strict=True))


@given(layouts, demands, st.integers(0, 2**24))
def test_the_default_holds_a_sequence_and_keeps_to_its_share(layout, demand, available_bytes):
    one = demand.pages_per_sequence(layout)
    pages = num_pages(layout, demand, 0, available_bytes)
    assert all(have >= need for have, need in zip(pages, one, strict=True))
    assert all(have <= demand.max_requests * need for have, need in zip(pages, one, strict=True))
    assert bytes_of(layout, pages) <= max(bytes_of(layout, one), available_bytes * DEFAULT_SHARE)


def test_windows_take_no_more_than_they_can_hold():
    layout = layout_of((1, 0, 8), (1, 16, 8))
    demand = CacheDemand(max_requests=2, max_model_len=1000, max_step_tokens=8)
    full, window = num_pages(layout, demand, 0, 2**40)
    assert full == 2 * 125
    assert window == 2 * 4


def test_too_little_is_refused_with_both_numbers():
    demand = CacheDemand(max_requests=1, max_model_len=64, max_step_tokens=8)
    with pytest.raises(TargetError, match=r"of 10 bytes.*needs 8192 bytes"):
        num_pages(layout_of((1, 0, 8)), demand, 10, 0)


def test_this_machine_has_memory():
    assert 2**20 < available_memory_bytes() < 2**50
