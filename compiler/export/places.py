"""Where the tensors of a checkpoint lie in the weights of a program: undoes renames, stacks and joins.

Knows shapes and names, and reads no values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...ir.weights import Cast, Concat, Expr, Source, Stack

_SWAPPED = ".gate_first"


class Place(NamedTuple):
    """Rows `start` to `stop` of a weight, of its `matrix` where it has several, are the stored `key`."""

    key: str
    matrix: int | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Piece:
    """The stored tensor `key` as rows of a program's weight: `ranges` in order, of matrix `index` where there
    are several. `owner` is the parameter of the model that it belongs to; an empty key is padding."""

    key: str
    owner: str
    index: int | None
    ranges: tuple[tuple[int, int], ...]

    def of(self, whole: Tensor, rows_per_line: int = 1) -> Tensor | None:
        """The rows cut from `whole`, whose lines stand for `rows_per_line` rows each; None where a cut would
        go through a line."""
        matrix = whole if self.index is None else whole[self.index]
        last = math.ceil(self.ranges[-1][1] / rows_per_line) == matrix.shape[0]
        for start, stop in self.ranges:
            if start % rows_per_line or (stop % rows_per_line and not (last and len(self.ranges) == 1)):
                return None
        parts = [matrix[start // rows_per_line : -(-stop // rows_per_line)] for start, stop in self.ranges]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def places_of(expr: Expr) -> list[Place] | None:
    """The whole stored tensors that `expr`, a parameter of the model, is put together from; None where it is
    made in another way than by stacking matrices and joining rows."""
    match expr:
        case Cast():
            return places_of(expr.of)
        case Source():
            return [Place(expr.key, None, 0, expr.shape[0] if expr.shape else 1)]
        case Stack() if len(expr.shape) == 3:
            return _stacked(expr.parts)
        case Concat() if expr.dim == max(0, len(expr.shape) - 2):
            return _joined(expr)
        case _:
            return None


def _stacked(parts: tuple[Expr, ...]) -> list[Place] | None:
    found: list[Place] = []
    for index, part in enumerate(parts):
        inner = places_of(part)
        if inner is None or any(place.matrix is not None for place in inner):
            return None
        found += [place._replace(matrix=index) for place in inner]
    return found


def _joined(expr: Concat) -> list[Place] | None:
    found: list[Place] = []
    row = 0
    for part in expr.parts:
        inner = places_of(part)
        if inner is None or (len(expr.shape) == 3 and any(place.matrix is None for place in inner)):
            return None
        found += [place._replace(start=place.start + row, stop=place.stop + row) for place in inner]
        row += part.shape[expr.dim]
    return found


@dataclass(frozen=True, slots=True)
class Layout:
    """The parameters of a model: where their stored tensors lie, and their shapes. `computed` are buffers
    that no checkpoint holds."""

    places: Mapping[str, list[Place] | None]
    shapes: Mapping[str, tuple[int, ...]]
    computed: frozenset[str]

    def is_computed(self, name: str) -> bool:
        """Whether the program's weight `name` is a buffer, or was folded from one."""
        return any(name == buffer or name.startswith(buffer + ".") for buffer in self.computed)

    def pieces(self, name: str) -> list[Piece] | None:
        """What the program's weight `name` is made of; None where it is no parameter of the model nor rows of
        several, or where the checkpoint stores those in a form that cannot be undone."""
        plain = name.removesuffix(_SWAPPED)
        owners = [plain] if plain in self.shapes else self._owners(plain)
        if owners is None:
            return None
        found: list[Piece] = []
        row = 0
        for owner in owners:
            rows = self._rows(owner)
            places = self.places.get(owner) if owner in self.shapes else [Place("", None, 0, rows)]
            if places is None:
                return None
            found += [
                Piece(place.key, owner, place.matrix, ((row + place.start, row + place.stop),))
                for place in places
            ]
            row += rows
        return found if plain == name else _unswapped(found, row)

    def _rows(self, owner: str) -> int:
        shape = self.shapes.get(owner) or self.shapes[owner.removesuffix("bias") + "weight"]
        return shape[-2] if len(shape) == 3 else shape[0] if shape else 1

    def _owners(self, name: str) -> list[str] | None:
        """The parameters behind a joined name `a.q+k+v.weight`; a bias may be missing where a weight is."""
        stem, _, part = name.rpartition(".")
        if "+" not in stem or part not in ("weight", "bias"):
            return None
        for shared, parts in _readings(stem):
            stems = [".".join((*shared, inner)) for inner in parts]
            if all(f"{each}.weight" in self.shapes for each in stems):
                return [f"{each}.{part}" for each in stems]
        return None


def _readings(stem: str) -> Iterator[tuple[list[str], list[str]]]:
    """Ways to read `a.b.q+k` as shared levels and what differs, the longest shared part first."""
    first, *others = stem.split("+")
    levels = first.split(".")
    for count in range(len(levels) - 1, -1, -1):
        yield levels[:count], [".".join(levels[count:]), *others]


def _unswapped(pieces: list[Piece], rows: int) -> list[Piece] | None:
    """Of a weight whose second half was put first: one stored tensor, its halves in the stored order."""
    if len(pieces) != 1 or pieces[0].index is not None or rows % 2:
        return None
    (piece,) = pieces
    half = rows // 2
    return [Piece(piece.key, piece.owner, None, ((half, rows), (0, half)))]
