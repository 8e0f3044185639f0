"""The shipped table of variants (`variants.json`), by architecture, kernel, scheme, shape and rows, and how
each was chosen. Where it has no entry the model chooses, and says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .variants import ProductClass, Variant, modelled

TABLE = Path(__file__).with_name("variants.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The variant of all products of `kernel`, of `rows` a program, whose scheme and shape match one of the
    patterns `schemes` and `shapes`, on each of `architectures`; `basis` is a key of the table's `bases`."""

    architectures: tuple[str, ...]
    kernel: str
    schemes: tuple[str, ...]
    shapes: tuple[str, ...]
    rows: tuple[int, ...]
    variant: Variant
    basis: str

    def covers(self, product: ProductClass, architecture: str) -> bool:
        """Whether it is an entry for `product` there."""
        return (
            architecture in self.architectures
            and product.kernel == self.kernel
            and product.rows in self.rows
            and any(fnmatchcase(product.shape, each) for each in self.shapes)
            and any(fnmatchcase(product.scheme, each) for each in self.schemes)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a class of products takes, and how that was found."""

    variant: Variant
    reason: str


@dataclass(frozen=True, slots=True)
class VariantTable:
    """Entries, of which the first that covers a product counts, and what their bases are in words."""

    entries: tuple[Entry, ...]
    bases: Mapping[str, str]

    def choice(self, product: ProductClass, architecture: str) -> Choice:
        """The entry's variant, or the model's where there is no entry."""
        for entry in self.entries:
            if entry.covers(product, architecture):
                return Choice(variant=entry.variant, reason=f"table: {self.bases[entry.basis]}")
        missing = f"{architecture}, {product.kernel}, {product.scheme}, {product.shape}, {product.rows} rows"
        return Choice(variant=modelled(product), reason=f"model: the table has no entry for {missing}")


class Choices:
    """`variants.Choose` for one architecture: what was measured, else the table's; remembers what it said.

    `measured` are variants by name of class, `where` the device.
    """

    def __init__(
        self, architecture: str, measured: Mapping[str, Variant] | None = None, where: str = ""
    ) -> None:
        self._architecture, self._measured, self._where = architecture, measured or {}, where
        self._table = shipped_table()
        self.taken: dict[str, Choice] = {}

    def __call__(self, product: ProductClass) -> Variant:
        """The variant of a class."""
        name = product.name
        if name not in self.taken:
            self.taken[name] = self._choice(product)
        return self.taken[name].variant

    def _choice(self, product: ProductClass) -> Choice:
        measured = self._measured.get(product.name)
        if measured is not None:
            return Choice(variant=measured, reason=f"measured on {self._where}")
        return self._table.choice(product, self._architecture)


def shipped_table() -> VariantTable:
    """The table that comes with llmc."""
    return read_table(json.loads(TABLE.read_text(encoding="utf-8")))


def read_table(data: Mapping[str, Any]) -> VariantTable:
    """A table from the data of its file."""
    entries = tuple(
        Entry(
            architectures=tuple(each["architectures"]),
            kernel=each["kernel"],
            schemes=tuple(each["schemes"]),
            shapes=tuple(each["shapes"]),
            rows=tuple(each["rows"]),
            variant=Variant(columns=each["columns"], warps=each["warps"], stages=each["stages"]),
            basis=each["basis"],
        )
        for each in data["entries"]
    )
    return VariantTable(entries, data["bases"])


def newest(architectures: tuple[str, ...]) -> str:
    """The one whose entries an artifact for all of them takes: launches are the same on each."""
    return max(architectures, key=lambda name: int(name.removeprefix("sm_")))
