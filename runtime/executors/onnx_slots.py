"""Where pages of block tables lie when every sequence has a buffer of its own, a slot, as ONNX's attention
wants it: in the slot that wrote them, or in a store of pages once that slot was given to another sequence.
Decides what must be copied before a step; moves nothing and knows no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ...spec.errors import InternalError


class Place(NamedTuple):
    """Values of one page: block `block` of slot `slot`; where `slot` is -1, page `block` of the store."""

    slot: int
    block: int


class Move(NamedTuple):
    """Copy the values of one page of `group` from `source` to `target`."""

    group: int
    source: Place
    target: Place


@dataclass(slots=True)
class _Slot:
    """What one buffer holds: for each group, block index -> (page, how often the page had been begun)."""

    held: list[dict[int, tuple[int, int]]]
    last_step: int = 0


@dataclass(slots=True)
class SlotBook:
    """Books over `num_slots` buffers for pages of `page_tokens[g]` tokens in each group g."""

    num_slots: int
    page_tokens: tuple[int, ...]
    _slots: list[_Slot] = field(init=False)
    _places: list[dict[int, Place]] = field(init=False)
    _begun: list[dict[int, int]] = field(init=False)
    _step: int = 0

    def __post_init__(self) -> None:
        groups = range(len(self.page_tokens))
        self._slots = [_Slot([{} for _ in groups]) for _ in range(self.num_slots)]
        self._places = [{} for _ in groups]
        self._begun = [{} for _ in groups]

    def begin_step(self) -> None:
        """A step begins: slots taken from now on stay with their sequences until the next."""
        self._step += 1

    def take(self, tables: Sequence[Sequence[int]], start: int, stop: int) -> tuple[int, list[Move]]:
        """The slot for a sequence that knows `start` tokens and computes up to `stop`, and what to copy.

        `tables[g]` is its block table. The slot that holds it already is found by its pages. Raises
        InternalError when more sequences than slots are in a step.
        """
        slot = self._holder(tables, start)
        moves: list[Move] = []
        if slot is None:
            slot = self._oldest()
            moves += self._evict(slot)
            moves += self._fill(slot, tables, start)
        else:
            moves += self._part_with(slot, tables, start)
        self._slots[slot].last_step = self._step
        self._write(slot, tables, start, stop)
        return slot, moves

    def copy_page(self, group: int, source: int, target: int) -> Move | None:
        """What to copy so that page `target` holds what `source` does; None for a page never written."""
        self._begin(group, target)
        place = self._places[group].get(source)
        if place is None:
            self._places[group].pop(target, None)
            return None
        self._places[group][target] = Place(-1, target)
        return Move(group, place, Place(-1, target))

    def _holder(self, tables: Sequence[Sequence[int]], start: int) -> int | None:
        if start == 0:
            return None
        for group, table in enumerate(tables):
            place = self._places[group].get(table[(start - 1) // self.page_tokens[group]])
            if place is not None and place.slot >= 0:
                break
        else:
            return None
        slot = self._slots[place.slot]
        if slot.last_step == self._step:
            return None
        known = (self._holds(slot, group, table, start) for group, table in enumerate(tables))
        return place.slot if all(known) else None

    def _holds(self, slot: _Slot, group: int, table: Sequence[int], start: int) -> bool:
        begun = self._begun[group]
        count = -(-start // self.page_tokens[group])
        pages = enumerate(table[:count])
        return all(page < 0 or slot.held[group].get(index) == (page, begun[page]) for index, page in pages)

    def _oldest(self) -> int:
        free = [index for index, slot in enumerate(self._slots) if slot.last_step < self._step]
        if not free:
            raise InternalError(
                "runtime.no_slot",
                f"A step has more than {self.num_slots} sequences.",
                "Each of them needs a buffer for its keys and values.",
                "Report this with the runtime settings that led to it.",
            )
        return min(free, key=lambda index: (self._slots[index].last_step, index))

    def _evict(self, index: int) -> list[Move]:
        """Empty a slot: what lies nowhere else goes to the store."""
        moves: list[Move] = []
        for group, held in enumerate(self._slots[index].held):
            for block in list(held):
                moves += self._save(group, index, block)
        return moves

    def _part_with(self, index: int, tables: Sequence[Sequence[int]], start: int) -> list[Move]:
        """Save what follows `start` in a slot and is not the sequence's own: a longer text whose beginning it
        shares lay there before."""
        moves: list[Move] = []
        for group, table in enumerate(tables):
            held = self._slots[index].held[group]
            block = -(-start // self.page_tokens[group])
            while block in held:
                if block >= len(table) or held[block][0] != table[block]:
                    moves += self._save(group, index, block)
                block += 1
        return moves

    def _save(self, group: int, index: int, block: int) -> list[Move]:
        """Let a slot forget a block; where its page lies nowhere else, it goes to the store."""
        page, begun = self._slots[index].held[group].pop(block)
        place, target = Place(index, block), Place(-1, page)
        if self._places[group].get(page) != place or self._begun[group][page] != begun:
            return []
        self._places[group][page] = target
        return [Move(group, place, target)]

    def _fill(self, index: int, tables: Sequence[Sequence[int]], start: int) -> list[Move]:
        """Bring the pages before `start` into an empty slot, which holds copies of them from then on."""
        moves: list[Move] = []
        for group, table in enumerate(tables):
            for block, page in enumerate(table[: -(-start // self.page_tokens[group])]):
                if page < 0:
                    continue
                place = self._places[group].get(page)
                if place is None:
                    raise InternalError(
                        "runtime.unwritten_page",
                        f"Page {page} of cache group {group} is read and was never written.",
                        "A sequence's earlier tokens must have been computed before it goes on.",
                        "Report this with the request mix that led to it.",
                    )
                moves.append(Move(group, place, Place(index, block)))
                self._slots[index].held[group][block] = (page, self._begun[group][page])
        return moves

    def _write(self, index: int, tables: Sequence[Sequence[int]], start: int, stop: int) -> None:
        for group, table in enumerate(tables):
            size = self.page_tokens[group]
            for block in range(start // size, -(-stop // size)):
                page = table[block]
                if page < 0:
                    continue
                if block * size >= start or self._places[group].get(page) != Place(index, block):
                    self._begin(group, page)
                self._places[group][page] = Place(index, block)
                self._slots[index].held[group][block] = (page, self._begun[group][page])

    def _begin(self, group: int, page: int) -> None:
        self._begun[group][page] = self._begun[group].get(page, 0) + 1
