"""The page books by themselves: sharing, eviction, windows, retirement, exact hits."""

from __future__ import annotations

import pytest

from llmc.runtime.blocks import BlockManager
from llmc.runtime.executors.simulated import simulated_caps
from llmc.runtime.visibility import first_visible, most_pages, most_tokens
from llmc.spec.cache import CacheGroup
from llmc.spec.errors import InternalError

pytestmark = pytest.mark.pure


def manager(*groups, prefix_cache=True):
    caps = simulated_caps(groups=groups or (("full", 0, 4, 8),))
    return BlockManager(caps.cache, caps.num_blocks, prefix_cache)


def run(blocks, token_ids, num_computed=None):
    """A sequence whose tokens are all computed in one step."""
    sequence = blocks.open(blocks.lookup(token_ids), len(token_ids))
    blocks.extend(sequence, len(token_ids))
    blocks.commit(sequence, token_ids, len(token_ids) if num_computed is None else num_computed)
    return sequence


def test_a_hit_shares_pages_and_leaves_one_token_to_compute():
    blocks = manager()
    first = run(blocks, list(range(8)))
    assert blocks.lookup(list(range(8))).num_tokens == 4
    hit = blocks.lookup(list(range(9)))
    assert hit.num_tokens == 8
    second = blocks.open(hit, 9)
    assert second.tables == first.tables
    assert blocks.used() == [2]
    blocks.close(first)
    assert blocks.used() == [2]
    blocks.close(second)
    assert blocks.available() == [8]
    blocks.check()
    assert (blocks.stats.query_tokens, blocks.stats.hit_tokens) == (17, 8)


def test_equal_pages_behind_different_chains_are_different():
    blocks = manager()
    run(blocks, [1, 2, 3, 4, 9, 9, 9, 9])
    assert blocks.lookup([5, 6, 7, 8, 9, 9, 9, 9, 0]).num_tokens == 0
    assert blocks.lookup([1, 2, 3, 4, 9, 9, 9, 8, 0]).num_tokens == 4


def test_colliding_hashes_are_told_apart_by_their_ids():
    """-1 and -2 have the same hash in CPython, so these two chains collide wherever hashes alone decide."""
    assert hash((-1,) * 4) == hash((-2,) * 4)
    blocks = manager()
    run(blocks, [-1] * 4)
    assert blocks.lookup([-2] * 5).num_tokens == 0
    assert blocks.lookup([-1] * 5).num_tokens == 4


def test_only_what_is_committed_is_found():
    blocks = manager()
    run(blocks, list(range(8)), num_computed=7)
    assert blocks.lookup(list(range(9))).num_tokens == 4


def test_the_least_recently_used_end_goes_first():
    blocks = manager(("full", 0, 4, 4))
    blocks.close(run(blocks, list(range(8))))
    blocks.close(run(blocks, list(range(10, 18))))
    assert blocks.available() == [4]
    blocks.close(run(blocks, [20, 21, 22, 23]))
    assert blocks.lookup(list(range(9))).num_tokens == 4
    assert blocks.lookup(list(range(10, 19))).num_tokens == 8
    blocks.close(run(blocks, list(range(30, 46))))
    assert blocks.lookup(list(range(10, 19))).num_tokens == 0
    blocks.check()


def test_a_touched_prefix_outlives_an_untouched_one():
    blocks = manager(("full", 0, 4, 4))
    blocks.close(run(blocks, [1] * 4))
    blocks.close(run(blocks, [2] * 4))
    blocks.close(run(blocks, [1] * 5))
    blocks.close(run(blocks, [3] * 12))
    assert blocks.lookup([2] * 5).num_tokens == 0
    assert blocks.lookup([1] * 5).num_tokens == 4


def test_pages_given_back_during_a_step_wait_for_its_end():
    blocks = manager(("full", 0, 4, 2), prefix_cache=False)
    sequence = run(blocks, [1] * 8)
    blocks.begin_epoch(1)
    blocks.begin_epoch(2)
    blocks.close(sequence)
    assert blocks.available() == [0]
    blocks.retire_epoch(1)
    assert blocks.available() == [0]
    blocks.retire_epoch(2)
    assert blocks.available() == [2]
    blocks.check()


def test_a_page_taken_again_while_it_retires_is_not_handed_out():
    blocks = manager(("full", 0, 4, 2))
    sequence = run(blocks, [1] * 4)
    blocks.begin_epoch(1)
    blocks.close(sequence)
    again = blocks.open(blocks.lookup([1] * 5), 5)
    blocks.begin_epoch(2)
    blocks.close(again)
    held = blocks.open(blocks.lookup([1] * 5), 5)
    blocks.retire_epoch(2)
    assert blocks.used() == [1]
    assert blocks.available() == [1]
    blocks.close(held)
    assert blocks.available() == [2]
    blocks.check()


def test_windows_free_what_no_query_sees():
    blocks = manager(("full", 0, 4, 16), ("window", 6, 4, 16))
    sequence = run(blocks, list(range(24)))
    # The next query, at 24, sees 19 to 24: pages 4 and 5 of the window group.
    assert [page >= 0 for page in sequence.tables[1]] == [False] * 4 + [True] * 2
    assert blocks.used() == [6, 2]
    assert sorted(index for group, index, page in sequence.unsent if (group, page) == (1, -1)) == [0, 1, 2, 3]


def test_a_hit_needs_every_group_where_it_looks():
    blocks = manager(("full", 0, 4, 16), ("window", 6, 4, 3))
    blocks.close(run(blocks, list(range(12))))
    hit = blocks.lookup(list(range(13)))
    assert hit.num_tokens == 12
    assert [page >= 0 for page in hit.pages[1]] == [False, True, True]
    sequence = blocks.open(hit, 13)
    blocks.extend(sequence, 13)
    assert sequence.tables[1][0] == -1
    blocks.close(sequence)
    blocks.close(run(blocks, list(range(50, 58))))
    # Two window pages were handed out again. The full group still holds the prefix; no window is whole.
    assert blocks.lookup(list(range(13))).num_tokens == 0


def test_groups_with_different_pages_hit_at_common_lengths():
    blocks = manager(("full", 0, 2, 32), ("full", 0, 6, 16))
    run(blocks, list(range(14)))
    assert blocks.lookup(list(range(14))).num_tokens == 12
    hit = blocks.lookup(list(range(14)))
    assert [len(pages) for pages in hit.pages] == [6, 2]


def test_running_out_is_an_error_not_a_wrong_page():
    blocks = manager(("full", 0, 4, 1))
    sequence = blocks.open(blocks.lookup([1] * 5), 5)
    with pytest.raises(InternalError, match="A page was asked for when none was left"):
        blocks.extend(sequence, 5)


def test_without_prefix_cache_nothing_is_found():
    blocks = manager(prefix_cache=False)
    blocks.close(run(blocks, list(range(8))))
    assert blocks.lookup(list(range(9))).num_tokens == 0
    assert blocks.stats.query_tokens == 0


def group(kind, window=0):
    return CacheGroup(
        layers=(0,),
        kind=kind,
        window=0 if kind == "full" else window,
        num_kv_heads=1,
        k_dim=1,
        v_dim=1,
        dtype="float32",
        page_tokens=4,
    )


@pytest.mark.parametrize("kind", ["full", "window", "chunk"])
@pytest.mark.parametrize("window", [1, 3, 4, 8, 9])
def test_visibility_bounds_against_counting(kind, window):
    spec = group(kind, window)
    for position in range(30):
        seen = [
            key
            for key in range(position + 1)
            if kind == "full"
            or (kind == "window" and key > position - window)
            or (kind == "chunk" and key // window == position // window)
        ]
        assert first_visible(spec, position) == seen[0]
    for num_new in (1, 5, 16):
        held = max(
            (start + num_new - 1) // 4 - first_visible(spec, start) // 4 + 1 for start in range(30 - num_new)
        )
        assert held <= most_pages(spec, 30, num_new)
    enough = max(position // 4 - first_visible(spec, position) // 4 + 1 for position in range(200))
    bound = most_tokens(spec, enough - 1)
    assert bound is not None
    assert bound == 4 * (enough - 1)
