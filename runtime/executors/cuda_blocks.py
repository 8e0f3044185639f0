"""Where a program repeats itself, as layers do: what was found of one layer is known of the next, for the
same arguments. Knows calls and their forms; launches nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .cuda_forms import Call, Form, Forms

# Forms that are kept: what is beyond is found again.
_FORMS = 32768


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Calls in a row. Those of blocks of one `kind` are of the same kinds and take the same of each other;
    what they take from elsewhere stands at the places `takes`, in the same order, and others take what its
    calls number `gives` give."""

    kind: int
    calls: tuple[Call, ...]
    takes: tuple[int, ...]
    gives: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class BlockForm:
    """The forms of a block's calls, and the numbers of their values; the rest is what a form has, of all of
    them, in order, grids as `[launches, 3]`."""

    forms: tuple[Form, ...]
    values: tuple[int, ...]
    skeleton: int
    words: NDArray[np.uint64]
    grids: NDArray[np.uint32]
    sizes: NDArray[np.int64]


class BlockForms:
    """Finds the forms of blocks, and remembers them."""

    def __init__(self, forms: Forms) -> None:
        self.forms = forms
        self._known: dict[tuple[int, ...], BlockForm] = {}

    def walk(self, blocks: Sequence[Block], inputs: dict[int, int]) -> list[BlockForm]:
        """The form of each of a program's blocks; `inputs` are the numbers of its inputs' values by place."""
        numbers, known, found = dict(inputs), self._known, list[BlockForm]()
        for block in blocks:
            key = (block.kind, *[numbers[place] for place in block.takes])
            form = known.get(key)
            if form is None:
                form = known[key] = self._form(block, numbers)
            found.append(form)
            for index in block.gives:
                numbers[block.calls[index].place] = form.values[index]
        return found

    def make_room(self) -> bool:
        """Forget everything where too much is known. What numbers meant before then means nothing."""
        if self.forms.num_known <= _FORMS:
            return False
        self._known.clear()
        self.forms.forget()
        return True

    def _form(self, block: Block, numbers: dict[int, int]) -> BlockForm:
        inner, forms = dict(numbers), list[Form]()
        for call in block.calls:
            forms.append(self.forms.form_of(call, inner))
            inner[call.place] = self.forms.number_of(forms[-1].value)
        return BlockForm(
            forms=tuple(forms),
            values=tuple(inner[call.place] for call in block.calls),
            skeleton=self.forms.number_kind(tuple(form.skeleton for form in forms)),
            words=np.asarray([word for form in forms for word in form.words], np.uint64),
            grids=np.asarray([grid for form in forms for grid in form.grids], np.uint32).reshape(-1, 3),
            sizes=np.asarray([size for form in forms for size in form.sizes], np.int64),
        )


def blocks_of(calls: Sequence[Call], number: Callable[[object], int]) -> tuple[Block, ...]:
    """`calls` as blocks: what comes before the longest repetition, each round of it, and what comes behind.
    `number` gives the same number to what is equal."""
    start, period, rounds = repetition([call.kind for call in calls])
    cuts = sorted({0, *(start + period * index for index in range(rounds + 1)), len(calls)})
    parts = [calls[begin:end] for begin, end in pairwise(cuts)]
    taken = [{place for call in part for place in call.varying} for part in parts]
    return tuple(
        _block(part, set[int]().union(*taken[index + 1 :]), number) for index, part in enumerate(parts)
    )


def _block(calls: Sequence[Call], wanted: Collection[int], number: Callable[[object], int]) -> Block:
    own = {call.place: index for index, call in enumerate(calls)}
    takes = tuple(dict.fromkeys(place for call in calls for place in call.varying if place not in own))
    names: dict[int, object] = {place: ("taken", index) for index, place in enumerate(takes)}
    names |= {place: ("own", index) for place, index in own.items()}
    gives = tuple(index for index, call in enumerate(calls) if call.place in wanted)
    shape = tuple((call.kind, tuple(names[place] for place in call.varying)) for call in calls)
    return Block(number((shape, gives)), tuple(calls), takes, gives)


def repetition(kinds: Sequence[int]) -> tuple[int, int, int]:
    """Of the part of `kinds` that repeats itself where most is saved by that: its start, its period and its
    rounds; 0 rounds where nothing does."""
    values, best, most = np.asarray(kinds), (0, 0, 0), 0
    for period in range(1, len(values) // 2 + 1):
        same = np.flatnonzero(np.concatenate([[True], values[period:] != values[:-period], [True]]))
        runs = np.diff(same) - 1
        longest = int(np.argmax(runs))
        rounds = int(runs[longest]) // period + 1
        if (rounds - 1) * period > most:
            best, most = (int(same[longest]), period, rounds), (rounds - 1) * period
    return best
