"""Forms of a product's kernel that give the same bits: how many columns a program takes, by how many warps,
with how many loads ahead. Which one is used is data: a shipped rule, or what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from .launch import blocks, power_of_two

# Programs that keep a GPU busy: where there are fewer, K is summed in parts, none of fewer than _PART.
_PROGRAMS, _PART, _MOST_PARTS = 200, 1024, 8
# Codes of a row that are few.
_SHORT = 512
# Programs that still do where each has twice the columns.
_WIDE_PROGRAMS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Columns of the weight that a program takes, its warps, and the loads that are ahead of their use.

    64 columns and more use the same matrix instructions, whose order of sums along K is one.
    """

    columns: int
    warps: int
    stages: int


def product_class(kernel: str, n: int, k: int, rows: int) -> str:
    """The name under which a choice is kept: products of one kernel, of one weight's shape, of up to `rows`
    rows a program."""
    return f"{kernel} {n}x{k} {rows}"


def layer_columns(kernel: str, n: int, k: int) -> int:
    """Columns that a program of few rows takes: few, so that many programs stream the weight. Codes in words
    take fewer instructions a weight with many, where enough programs are left."""
    is_wide = kernel.endswith("words") and blocks(n, 128) * _parts(n, k, 128) >= _WIDE_PROGRAMS
    return 128 if is_wide else 64


def num_parts(kernel: str, n: int, k: int) -> int:
    """The parts in which K is summed: a function of the layer alone, so that a narrow matrix keeps a GPU busy
    with one row, too, and its sums are the same with many."""
    return _parts(n, k, layer_columns(kernel, n, k))


def shipped(kernel: str, n: int, k: int, rows: int) -> Variant:
    """What is used where nothing was measured; many rows share each weight loaded."""
    columns = _most_columns(kernel, n, k, rows) if rows >= 128 else layer_columns(kernel, n, k)
    return Variant(columns=columns, warps=4 if rows < 128 else 8, stages=4 if rows < 64 else 3)


def variants_of(kernel: str, n: int, k: int, rows: int) -> tuple[Variant, ...]:
    """What is tried for a class: the shipped form first, then those that differ from it in one thing or in
    two."""
    first = shipped(kernel, n, k, rows)
    columns = tuple(dict.fromkeys((64, _most_columns(kernel, n, k, rows))))
    warps = (4, 8)
    stages = tuple(dict.fromkeys((first.stages, 3, 5)))
    found = [Variant(columns=c, warps=w, stages=s) for c in columns for w in warps for s in stages]
    near = [each for each in found if sum(map(int.__ne__, _numbers(each), _numbers(first))) <= 2]
    return (first, *(each for each in near if each != first))


def _most_columns(kernel: str, n: int, k: int, rows: int) -> int:
    """With many rows, sums of groups, of a part and of all parts of codes are more than registers hold, and
    so are sums and loads of codes where those of a whole row are made at once."""
    is_coded = rows >= 128 and kernel != "linear.linear"
    return 64 if is_coded and (num_parts(kernel, n, k) > 1 or k < _SHORT) else 128


def _parts(n: int, k: int, columns: int) -> int:
    wanted = power_of_two(blocks(_PROGRAMS, blocks(n, columns)))
    return max(1, min(wanted, _MOST_PARTS, (1 << (k // _PART).bit_length()) >> 1))


def _numbers(variant: Variant) -> tuple[int, int, int]:
    return variant.columns, variant.warps, variant.stages
