"""Launches of a step's own kernels: opening, sampling and settling it over permanent rows. Works on anything
that has a tensor's shape and dtype, as `kernels.cuda.operators` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .launch import Launcher, blocks, launch_of, power_of_two
from .row_state import WORDS

# Tokens of the vocabulary that one program takes, and bins of a histogram.
CHUNK = 2048
BINS = 2048
_ROUNDS = (20, 10, 0)
_PAGES_AT_ONCE = 256

# Makes a tensor on the device: shape and name of a dtype.
Empty = Callable[[tuple[int, ...], str], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTables:
    """What the device keeps of each permanent row: its record int64 `[rows, WORDS]`, occurrences int32
    `[rows, V]` (twice how often a token was generated, one more if the prompt has it), biases float32 `[rows,
    V]`, tokens banned at first, as bits int32 `[rows, ceil(V / 32)]`, and block tables int64 `[rows, pages]`
    of each cache group."""

    state: Any
    counts: Any
    bias: Any
    banned: Any
    tables: tuple[Any, ...]


def make_tables(empty: Empty, num_rows: int, vocab_size: int, pages: tuple[int, ...]) -> RowTables:
    """The tables of `num_rows` rows, not initialised."""
    return RowTables(
        state=empty((num_rows, WORDS), "int64"),
        counts=empty((num_rows, vocab_size), "int32"),
        bias=empty((num_rows, vocab_size), "float32"),
        banned=empty((num_rows, blocks(vocab_size, 32)), "int32"),
        tables=tuple(empty((num_rows, count), "int64") for count in pages),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Which logit rows are sampled for whom, all int32 tensors: see `sampling.shape_logits` and
    `step.settle`. `masks` are int32 `[rows, ceil(V / 32)]`."""

    row_of: Any
    ahead: Any
    drafts: Any
    mask_of: Any
    masks: Any
    first: Any
    count: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSpace:
    """What sampling `R` logit rows works in: `bins` start as zeros and are left so."""

    shaped: Any
    best: Any
    place: Any
    bad: Any
    score: Any
    drawn: Any
    keys: Any
    sums: Any
    bins: Any


def make_space(empty: Empty, num_rows: int, vocab_size: int, chunk: int = CHUNK) -> SampleSpace:
    """Space for `num_rows` logit rows, not initialised."""
    chunks = blocks(vocab_size, chunk)
    return SampleSpace(
        shaped=empty((num_rows, vocab_size), "float32"),
        best=empty((num_rows, chunks), "float32"),
        place=empty((num_rows, chunks), "int32"),
        bad=empty((num_rows, chunks), "int32"),
        score=empty((num_rows, chunks), "float64"),
        drawn=empty((num_rows, chunks), "int32"),
        keys=empty((num_rows, 2), "int32"),
        sums=empty((num_rows, 2), "int64"),
        bins=empty((num_rows, BINS), "int64"),
    )


def space_bytes(num_rows: int, vocab_size: int) -> int:
    """Bytes of `make_space`."""
    return num_rows * (4 * vocab_size + 24 * blocks(vocab_size, CHUNK) + 24 + 8 * BINS)


def table_bytes(num_rows: int, vocab_size: int, pages: tuple[int, ...]) -> int:
    """Bytes of `make_tables`."""
    return num_rows * (8 * WORDS + 8 * vocab_size + 4 * blocks(vocab_size, 32) + 8 * sum(pages))


@dataclass(frozen=True, slots=True)
class DeviceSampler:
    """Opens, samples and settles steps. `chunk` tokens of the vocabulary are a program's, a power of two."""

    launch: Launcher
    chunk: int = CHUNK

    def fill_ids(self, ids: Any, row_of: Any, state: Any) -> None:
        """`step.fill_ids`: int64 ids and int32 rows `[T]`."""
        values = {"ids_ptr": ids, "row_of_ptr": row_of, "state_ptr": state}
        self.launch(launch_of("step.fill_ids", (ids.shape[0],), values, {}, warps=1))

    def open_step(
        self,
        given: tuple[Any, Any, Any],
        tables: RowTables,
        ids: Any,
        positions: Any,
        groups: list[tuple[Any, Any, int]],
    ) -> None:
        """Inputs of a step whose `given` are int32 `[T]`: row, token and position of each token, as
        `step.open_step` has them. Ids and positions are int64 `[T]`; of each cache group its block table
        int64 `[T, pages]`, its slots int64 `[T]`, and its tokens a page."""
        rows, tokens, places = given
        grid = (rows.shape[0],)
        state = {"state_ptr": tables.state}
        opened = {"rows_ptr": rows, "tokens_ptr": tokens, "places_ptr": places} | state
        opened |= {"ids_ptr": ids, "positions_ptr": positions}
        self.launch(launch_of("step.open_step", grid, opened, {}, warps=1))
        for held, (table, slots, page) in zip(tables.tables, groups, strict=True):
            placed = {"rows_ptr": rows} | state | {"tables_ptr": held, "positions_ptr": positions}
            placed |= {"table_ptr": table, "slots_ptr": slots, "pages": table.shape[1]}
            constants = {"PAGE": page, "BLOCK": _PAGES_AT_ONCE}
            self.launch(launch_of("step.open_pages", grid, placed, constants, warps=2))

    def change_pages(self, changes: Any, table: Any) -> None:
        """Writes int32 `changes[n, 3]` of (row, index, page) into a group's permanent block tables."""
        values = {"changes_ptr": changes, "tables_ptr": table, "pages": table.shape[1]}
        self.launch(launch_of("step.change_pages", (changes.shape[0],), values, {}, warps=1))

    def sample(
        self,
        logits: Any,
        samples: Samples,
        tables: RowTables,
        space: SampleSpace,
        results: Any,
        *,
        filtered: bool,
    ) -> None:
        """Samples logits `[R, V]` and settles: int32 `results[segments, width]` as `step.settle` has them.

        `filtered` says that a row may have top_k or top_p; without it they are not looked at.
        """
        num_rows, vocab_size = logits.shape
        chunks = blocks(vocab_size, self.chunk)
        wide = {"CHUNKS": chunks, "CHUNK_BLOCK": power_of_two(chunks)}
        cut = {"V": vocab_size, "BLOCK": self.chunk}
        whose = {"row_of_ptr": samples.row_of}
        behind = {"ahead_ptr": samples.ahead, "drafts_ptr": samples.drafts}
        partial = {"best_ptr": space.best, "place_ptr": space.place}
        state = {"state_ptr": tables.state}
        values = {"logits_ptr": logits} | whose | behind
        values |= {"mask_of_ptr": samples.mask_of, "masks_ptr": samples.masks} | state
        values |= {"counts_ptr": tables.counts, "bias_ptr": tables.bias, "banned_ptr": tables.banned}
        values |= {"shaped_ptr": space.shaped} | partial | {"bad_ptr": space.bad}
        constants = cut | {"MASK_WORDS": blocks(vocab_size, 32), "CHUNKS": chunks}
        self.launch(launch_of("sampling.shape_logits", (num_rows, chunks), values, constants))
        shaped = {"shaped_ptr": space.shaped} | whose
        if filtered:
            for by_mass in (False, True):
                self._search(by_mass, num_rows, chunks, shaped | partial | state, cut | wide, space)
        values = shaped | {"ahead_ptr": samples.ahead} | partial | state
        values |= {"keys_ptr": space.keys, "score_ptr": space.score, "drawn_ptr": space.drawn}
        self.launch(
            launch_of("sampling.draw", (num_rows, chunks), values, cut | wide | {"FILTERED": filtered})
        )
        values = whose | {"first_ptr": samples.first, "count_ptr": samples.count}
        values |= {"drafts_ptr": samples.drafts} | partial | {"bad_ptr": space.bad}
        values |= {"score_ptr": space.score, "drawn_ptr": space.drawn} | state
        values |= {"counts_ptr": tables.counts, "results_ptr": results, "width": results.shape[1]}
        last = {"V": vocab_size} | wide
        self.launch(launch_of("step.settle", (samples.first.shape[0],), values, last, warps=1))

    def _search(
        self,
        by_mass: bool,
        num_rows: int,
        chunks: int,
        values: dict[str, Any],
        constants: dict[str, Any],
        space: SampleSpace,
    ) -> None:
        """The key of the last token that top_k, or top_p, leaves."""
        found = {"keys_ptr": space.keys, "bins_ptr": space.bins}
        for shift in _ROUNDS:
            how = {"SHIFT": shift, "BY_MASS": by_mass}
            self.launch(launch_of("sampling.count_keys", (num_rows, chunks), values | found, constants | how))
            chosen = {"row_of_ptr": values["row_of_ptr"], "state_ptr": values["state_ptr"]}
            chosen |= {"bins_ptr": space.bins, "keys_ptr": space.keys, "sums_ptr": space.sums}
            self.launch(launch_of("sampling.choose_bits", (num_rows,), chosen, how))
