"""What a step does beside the model: where its tokens stand, read from the permanent rows, and what becomes
of its samples. One program a sequence, and scalars alone."""

# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl

from .sampling import best_of_row, real

_LENGTH = tl.constexpr(0)
_LAST_TOKEN = tl.constexpr(1)
_HAS_FAILED = tl.constexpr(3)
_USES = tl.constexpr(7)
_TEMPERATURE = tl.constexpr(8)
_WORDS = tl.constexpr(16)


@triton.jit
def fill_ids(ids_ptr, row_of_ptr, state_ptr):
    """Replaces `ids[t]` below 0 by the last token of row `row_of[t]`; 0 where it has none. Grid (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    if tl.load(ids_ptr + token) < 0:
        row = tl.load(row_of_ptr + token).to(tl.int64)
        last = tl.load(state_ptr + tl.maximum(row, 0) * _WORDS + _LAST_TOKEN)
        tl.store(ids_ptr + token, tl.where(row >= 0, tl.maximum(last, 0), 0))


@triton.jit
def open_step(rows_ptr, tokens_ptr, places_ptr, state_ptr, ids_ptr, positions_ptr):
    """Input ids and positions `[T]` of a step: token t is `tokens[t]` (negative: the last one that is known)
    of row `rows[t]`, at position `places[t]`; a negative row is nobody's, who has token 0 at position 0. Grid
    (T,)."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + token).to(tl.int64)
    last = tl.maximum(tl.load(state_ptr + tl.maximum(row, 0) * _WORDS + _LAST_TOKEN), 0)
    given = tl.load(tokens_ptr + token).to(tl.int64)
    place = tl.load(places_ptr + token).to(tl.int64)
    tl.store(ids_ptr + token, tl.where(row >= 0, tl.where(given >= 0, given, last), 0))
    tl.store(positions_ptr + token, tl.where(row >= 0, place, 0))


@triton.jit
def open_pages(
    rows_ptr,
    state_ptr,
    tables_ptr,
    positions_ptr,
    table_ptr,
    slots_ptr,
    pages,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Block tables `[T, pages]` and slots `[T]` of one cache group behind `open_step`, from the permanent
    `tables[rows, pages]`: each token attends as a sequence of its own. Grid (T,).

    A row whose last sample failed writes nothing, nor does nobody.
    """
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + token).to(tl.int64)
    position = tl.load(positions_ptr + token)
    held = tables_ptr + tl.maximum(row, 0) * pages
    last_page = position // PAGE
    for start in tl.range(0, last_page + 1, BLOCK):  # pyright: ignore[reportGeneralTypeIssues]
        index = start + tl.arange(0, BLOCK)
        page = tl.load(held + index, mask=index <= last_page, other=-1)
        page = tl.where(row >= 0, page, -1)
        tl.store(table_ptr + token * pages + index, page, mask=index <= last_page)
    page = tl.load(held + last_page)
    failed = tl.load(state_ptr + tl.maximum(row, 0) * _WORDS + _HAS_FAILED) != 0
    writes = (row >= 0) & (page >= 0) & (failed == 0)
    tl.store(slots_ptr + token, tl.where(writes, page * PAGE + position % PAGE, -1))


@triton.jit
def change_pages(changes_ptr, tables_ptr, pages):
    """`tables[changes[i, 0], changes[i, 1]] = changes[i, 2]`. Grid (changes,); each entry at most once."""
    change = changes_ptr + tl.program_id(0) * 3
    row = tl.load(change).to(tl.int64)
    tl.store(tables_ptr + row * pages + tl.load(change + 1), tl.load(change + 2).to(tl.int64))


@triton.jit
def settle(
    row_of_ptr, first_ptr, count_ptr, drafts_ptr, best_ptr, place_ptr, bad_ptr, score_ptr, drawn_ptr,
    state_ptr, counts_ptr, results_ptr, width, V: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNK_BLOCK: tl.constexpr,
):  # fmt: skip
    """The samples of each segment up to the first that differs from its draft, and the rows that they change.

    Grid (segments,). Segment i has logit rows `first[i]` … `first[i] + count[i] - 1`, none where it is
    nobody's, and `drafts[r]` is the draft behind logit row r (-1 behind the last). `results[i]` of `width`
    words is the number of samples and the samples, or -1 where a row that was reached cannot be sampled, now
    or in an earlier step.
    """
    segment = tl.program_id(0).to(tl.int64)
    first = tl.load(first_ptr + segment).to(tl.int64)
    count = tl.load(count_ptr + segment)
    row = tl.where(count > 0, tl.load(row_of_ptr + first), -1).to(tl.int64)
    result, record = results_ptr + segment * width, state_ptr + row * _WORDS
    if row >= 0:
        failed = tl.load(record + _HAS_FAILED).to(tl.int32)
        uses_counts = (tl.load(record + _USES) & 2) != 0
        is_random = real(state_ptr, row, _TEMPERATURE).to(tl.float32) != 0.0
        chunk = tl.arange(0, CHUNK_BLOCK)
        num_taken, last = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
        going = tl.full([], 1, tl.int32)
        for index in tl.range(0, count):
            at = first + index
            found = best_of_row(best_ptr, place_ptr, at, CHUNKS, CHUNK_BLOCK)
            token = found[1]
            if is_random:
                token = best_of_row(score_ptr, drawn_ptr, at, CHUNKS, CHUNK_BLOCK)[1]
            bad = tl.max(tl.load(bad_ptr + at * CHUNKS + chunk, mask=chunk < CHUNKS, other=0), 0)
            usable = ((bad == 0) & (found[0] > -float("inf"))).to(tl.int32)
            failed = failed | (going & (1 - usable))
            takes = going & usable
            tl.store(result + 1 + num_taken, token, mask=takes != 0)
            if uses_counts & (takes != 0):
                tl.atomic_add(counts_ptr + row * V + token, 2, sem="relaxed")
            num_taken += takes
            last = tl.where(takes != 0, token, last)
            going = takes & (token == tl.load(drafts_ptr + at)).to(tl.int32)
        if failed != 0:
            tl.store(result, -1)
            tl.store(record + _HAS_FAILED, tl.full([], 1, tl.int64))
        else:
            tl.store(result, num_taken)
            tl.store(record + _LENGTH, tl.load(record + _LENGTH) + num_taken)
            tl.store(record + _LAST_TOKEN, last.to(tl.int64))
    else:
        tl.store(result, 0)
