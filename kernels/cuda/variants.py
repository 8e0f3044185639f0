"""Forms of a product's kernel that give the same bits: how many columns a program takes, by how many warps,
with how many loads ahead. Which one is used is data: a shipped table's, or what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .launch import blocks, power_of_two

# Programs that keep a GPU busy: where there are fewer, K is summed in parts, none of fewer than _PART.
_PROGRAMS, _PART, _MOST_PARTS = 200, 1024, 8
# The scheme of weights that are no codes.
NO_SCHEME = "dense"
# Codes of a row that are few.
_SHORT = 512
# Programs that still do where each has twice the columns, and those that run at once, one on each
# multiprocessor of an H200.
_WIDE_PROGRAMS, _MULTIPROCESSORS = 128, 132


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Columns of the weight that a program takes, its warps, and the loads that are ahead of their use.

    64 columns and more use the same matrix instructions, whose order of sums along K is one.
    """

    columns: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductClass:
    """Products that share a choice: of one kernel and scheme (or `NO_SCHEME`), of one
    weight `[n, k]`, of up to `rows` rows a program."""

    kernel: str
    scheme: str
    n: int
    k: int
    rows: int

    @property
    def name(self) -> str:
        """What the choice is kept under."""
        return f"{self.kernel} {self.scheme} {self.n}x{self.k} {self.rows}"

    @property
    def shape(self) -> str:
        """What of the weight's shape a choice depends on: whether programs of 128 columns are enough (`wide`
        or `narrow`), and whether K is summed in `parts`, as a `whole`, or is `short`."""
        width = "wide" if _is_wide(self.n, self.k) else "narrow"
        if num_parts(self.kernel, self.n, self.k) > 1:
            return f"{width} parts"
        return f"{width} {'short' if self.k < _SHORT else 'whole'}"


# What says which variant a class of products takes.
Choose = Callable[[ProductClass], Variant]


def layer_columns(kernel: str, n: int, k: int) -> int:
    """Columns that a program of few rows takes: few, so that many programs stream the weight. Codes in words
    take fewer instructions a weight with many, where enough programs are left."""
    return 128 if kernel.endswith("words") and _is_wide(n, k) else 64


def num_parts(kernel: str, n: int, k: int) -> int:
    """The parts in which K is summed: a function of the layer alone, so that a narrow matrix keeps a GPU busy
    with one row, too, and its sums are the same with many."""
    wide = layer_columns(kernel, n, k) == 128
    return _wide_parts(n, k) if wide else _parts(k, blocks(n, 64))


def modelled(product: ProductClass) -> Variant:
    """What the budget of instructions says, where no entry of the table does: few rows stream the weight
    through many programs, many share each weight loaded."""
    kernel, rows = product.kernel, product.rows
    few = layer_columns(kernel, product.n, product.k)
    columns = few if rows < 128 else _most_columns(product)
    # Sums of 64 rows and 128 columns, of a group and of all, are more than registers of four warps hold.
    warps = 4 if rows * columns <= 64 * 64 else 8
    return Variant(columns=columns, warps=warps, stages=4 if rows < 64 else 3)


def variants_of(product: ProductClass, first: Variant) -> tuple[Variant, ...]:
    """What is tried for a class: `first`, then those that differ from it in one thing or in two."""
    columns = tuple(dict.fromkeys((64, _most_columns(product))))
    stages = tuple(dict.fromkeys((first.stages, 3, 5)))
    found = [Variant(columns=c, warps=w, stages=s) for c in columns for w in (4, 8) for s in stages]
    near = [each for each in found if sum(map(int.__ne__, _numbers(each), _numbers(first))) <= 2]
    return (first, *(each for each in near if each != first))


def _most_columns(product: ProductClass) -> int:
    """With many rows, sums of groups, of a part and of all parts of codes are more than registers hold, and
    so are sums and loads of codes where those of a whole row are made at once."""
    is_coded = product.rows >= 128 and product.kernel != "linear.linear"
    return 64 if is_coded and not product.shape.endswith("whole") else 128


def _is_wide(n: int, k: int) -> bool:
    """Whether programs of 128 columns are enough, or as many as those of 64 would be; or whether K has no
    parts and some multiprocessor would have two of 64, which are more instructions than one of 128."""
    programs, few = blocks(n, 128) * _wide_parts(n, k), blocks(n, 64)
    parts = _parts(k, few)
    if programs >= _WIDE_PROGRAMS or (few % 2 == 0 and programs >= few * parts):
        return True
    return parts == 1 and few > _MULTIPROCESSORS


def _wide_parts(n: int, k: int) -> int:
    """Where programs are few, parts may be half as long, which are as many weights a program."""
    parts = _parts(k, blocks(n, 128))
    if blocks(n, 128) * parts >= _WIDE_PROGRAMS:
        return parts
    return _parts(k, blocks(n, 128), _PART // 2)


def _parts(k: int, programs: int, least: int = _PART) -> int:
    wanted = power_of_two(blocks(_PROGRAMS, programs))
    return max(1, min(wanted, _MOST_PARTS, (1 << (k // least).bit_length()) >> 1))


def _numbers(variant: Variant) -> tuple[int, int, int]:
    return variant.columns, variant.warps, variant.stages
