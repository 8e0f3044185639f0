"""Where pages lie when every sequence has a buffer: moves of values, checked against a paged cache."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmc.runtime.executors.onnx_slots import Place, SlotBook
from llmc.spec.errors import InternalError

pytestmark = pytest.mark.pure
PAGE = 4


class Values:
    """Values of buffers and store, moved as the book says: what a token's cache entry is, is its history."""

    def __init__(self, num_slots):
        self.book = SlotBook(num_slots, (PAGE,))
        self.slots = [{} for _ in range(num_slots)]
        self.store = {}

    def cells(self, place):
        if place.slot < 0:
            return self.store, place.block * PAGE
        return self.slots[place.slot], place.block * PAGE

    def move(self, moves):
        for move in moves:
            (source, at), (target, to) = self.cells(move.source), self.cells(move.target)
            for offset in range(PAGE):
                target[to + offset] = source.get(at + offset)

    def compute(self, table, tokens, start):
        """One step of a sequence: what its attention would read, after writing tokens[start:]."""
        slot, moves = self.book.take([table], start, len(tokens))
        self.move(moves)
        for position in range(start, len(tokens)):
            self.slots[slot][position] = tuple(tokens[: position + 1])
        return slot, [self.slots[slot].get(position) for position in range(len(tokens))]


def expected(tokens):
    return [tuple(tokens[: position + 1]) for position in range(len(tokens))]


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), num_slots=st.integers(2, 4), rows=st.integers(1, 6))
def test_every_sequence_reads_its_own_values(seed, num_slots, rows):
    """Rows grow, take back tokens, share beginnings, fork by copied pages, leave and come back."""
    rng = random.Random(seed)
    values, free = Values(num_slots), list(range(64))
    live, cached = {}, []
    for _ in range(40):
        values.book.begin_step()
        for row in rng.sample(range(rows), min(num_slots, rows)):
            tokens, table, known = live.pop(row, ([], [], 0))
            if not table and cached and rng.random() < 0.6:
                prefix, pages = rng.choice(cached)
                count = rng.randrange(len(prefix) // PAGE + 1)
                tokens, table, known = list(prefix[: count * PAGE]), list(pages[:count]), count * PAGE
                if known < len(prefix) and count < len(pages) and free and rng.random() < 0.5:
                    fork = free.pop()
                    move = values.book.copy_page(0, pages[count], fork)
                    values.move([move] if move else [])
                    extra = rng.randrange(1, min(PAGE, len(prefix) - known) + 1)
                    tokens, table = list(prefix[: known + extra]), [*table, fork]
                    known += extra
            tokens = [*tokens[:known], *(rng.randrange(99) for _ in range(rng.randrange(1, 7)))]
            while len(table) * PAGE < len(tokens):
                if not free:
                    return
                table.append(free.pop())
            _, seen = values.compute(table, tokens, known)
            assert seen == expected(tokens)
            if rng.random() < 0.2:
                cached.append((tuple(tokens), tuple(table)))
            elif rng.random() < 0.9:
                live[row] = (tokens, table, len(tokens) - rng.choice((0, 0, 0, 1)))


def test_a_sequence_that_goes_on_moves_nothing():
    values = Values(2)
    values.book.begin_step()
    slot, moves = values.book.take([[5, 6]], 0, 6)
    assert moves == []
    for stop in (7, 8):
        values.book.begin_step()
        assert values.book.take([[5, 6]], stop - 1, stop) == (slot, [])


def test_a_beginning_in_another_buffer_is_copied_and_an_old_buffer_is_saved():
    book = SlotBook(1, (PAGE,))
    book.begin_step()
    book.take([[5, 6]], 0, 8)
    book.begin_step()
    slot, moves = book.take([[9]], 0, 2)
    assert [(move.source, move.target) for move in moves] == [
        (Place(slot, 0), Place(-1, 5)),
        (Place(slot, 1), Place(-1, 6)),
    ]
    book.begin_step()
    slot, moves = book.take([[5, 7]], 4, 6)
    assert (moves[-1].source, moves[-1].target) == (Place(-1, 5), Place(slot, 0))


def test_a_shorter_text_saves_what_followed_its_beginning():
    book = SlotBook(2, (PAGE,))
    book.begin_step()
    slot, _ = book.take([[5, 6]], 0, 8)
    book.begin_step()
    again, moves = book.take([[5, 7]], 4, 6)
    assert (again, [move.target for move in moves]) == (slot, [Place(-1, 6)])


def test_more_sequences_than_buffers_are_refused():
    book = SlotBook(1, (PAGE,))
    book.begin_step()
    book.take([[1]], 0, 2)
    with pytest.raises(InternalError, match="more than 1 sequences"):
        book.take([[2]], 0, 2)


def test_reading_a_page_that_nobody_wrote_is_refused():
    book = SlotBook(1, (PAGE,))
    book.begin_step()
    with pytest.raises(InternalError, match="never written"):
        book.take([[1]], 2, 3)
