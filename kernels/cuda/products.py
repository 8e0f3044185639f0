"""Matrix products by launches: which kernel, which blocks, which grid. Block sizes along K depend on the
layer alone: no row's bits depend on its batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ...spec.errors import TargetError
from ...spec.quant import QuantScheme, parse_activation, parse_scheme
from .launch import Launcher, blocks, launch_of, power_of_two, row_stride
from .variants import NO_SCHEME, Choose, ProductClass, modelled, num_parts

# (a tensor, shape, dtype or None) -> a tensor.
Empty = Callable[[Any, tuple[int, ...], Any], Any]


def _new_empty(like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """From torch's own allocator."""
    return like.new_empty(shape, dtype=dtype or like.dtype)


@dataclass(frozen=True, slots=True)
class Routing:
    """Which rows of x and which expert a tile of a product takes: `kernels.cuda.experts.place_pairs` fills
    `experts[tiles]` and `pairs[tiles * rows]`. `shared` pairs have one row of x in common; 0 is for products
    that all rows take part in, in order."""

    experts: Any
    pairs: Any
    shared: int

    @property
    def values(self) -> dict[str, Any]:
        """The kernel's parameters."""
        return {"experts_ptr": self.experts, "pairs_ptr": self.pairs}


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm of a product's rows: its weight `[K]`, and what is added to that and to the mean square."""

    weight: Any
    eps: float
    offset: float


@dataclass(frozen=True, slots=True)
class Around:
    """What a product does beside multiplying: the norm of its rows before, and behind it the gating of the
    first half of its columns by an activation of the second's, and the addition of a residual of its result's
    shape."""

    norm: Norm | None = None
    gate: str = ""
    residual: Any = None


ALONE = Around()
# Rows up to which parts are programs of their own, and a norm is each program's own: in both ways the same
# bits, and with more rows more work than they save.
_APART_ROWS, _NORM_ROWS = 64, 8

# Tiles that a product summed in parts may have.
ARRIVALS = 256

ALL_ROWS = Routing(None, None, 0)
DENSE, WORDS, BYTES = "linear.linear", "linear.linear_words", "linear_bytes.linear_bytes"


@dataclass(frozen=True, slots=True)
class CudaProducts:
    """Products named and called like those of `ir.ops`, results in new tensors of the inputs' device.

    `empty(like, shape, dtype)` makes every tensor that an operator keeps or works in: on the device of
    `like`, and of its dtype where none is given. `arrived` are zeros, int32, one for each tile of a product
    that is summed in parts; each product leaves them so. Without them each makes its own. `choose` says
    which variant a class of products takes. If not `invariant`, torch multiplies many rows by dense weights,
    and their bits depend on how many they are.
    """

    launch: Launcher
    empty: Empty = _new_empty
    arrived: Any = field(default=None, repr=False)
    choose: Choose = modelled
    invariant: bool = True

    def linear(self, x: Any, weight: Any, bias: Any, around: Around = ALONE) -> Any:
        """`llmc.linear`."""
        rows = self._rows(x)
        n, k = weight.shape
        y = self._result(x, n, around)
        tile = self._tile(DENSE, NO_SCHEME, rows.shape[0], n, k)
        self._dense(rows, weight, bias, y, tile, ALL_ROWS, around, num_parts(DENSE, n, k))
        return y

    def quantized_linear(
        self,
        x: Any,
        codes: Any,
        scales: Any,
        zeros: Any,
        bias: Any,
        scheme: str,
        activation: str = "",
        activation_scale: Any = None,
        around: Around = ALONE,
    ) -> Any:
        """`llmc.quantized_linear`, codes of fewer than 8 bits in words. Raises TargetError for a scheme or
        activation without a kernel."""
        rows = self._rows(x)
        n, k = scales.shape[0], x.shape[-1]
        expect_scheme(scheme, group_of(parse_scheme(scheme), k), activation)
        y = self._result(x, n, around)
        kernel = coded_kernel(scheme)
        tile, parts = self._tile(kernel, scheme, rows.shape[0], n, k), num_parts(kernel, n, k)
        row_scales = None
        if activation:
            rows, row_scales = self._rounded(rows, activation, activation_scale, around.norm)
            around = replace(around, norm=None)
        weight = (codes, scales, zeros)
        self._coded(rows, weight, bias, y, scheme, tile, ALL_ROWS, around, parts, activation, row_scales)
        return y

    def library_multiplies(self, x: Any, weight: tuple[Any, ...], norm: tuple[Any, ...] | None) -> bool:
        """Whether torch multiplies such rows, or their norm, by a weight (as in `CudaOperators.product`); not
        where dtypes differ."""
        if self.invariant or len(weight) != 2 or x.numel() // x.shape[-1] <= _APART_ROWS:
            return False
        return weight[0].dtype == x.dtype and (norm is None or norm[0].dtype == x.dtype)

    def _tile(self, kernel: str, scheme: str, m: int, n: int, k: int) -> Tile:
        """Blocks of a product of m rows."""
        rows = rows_of_program(m, scheme)
        variant = self.choose(ProductClass(kernel=kernel, scheme=scheme, n=n, k=k, rows=rows))
        grid = (blocks(n, variant.columns), blocks(m, rows), 1)
        return Tile(grid, {"BM": rows, "BN": variant.columns}, variant.warps, variant.stages)

    def _result(self, x: Any, n: int, around: Around) -> Any:
        return self.empty(x, (*x.shape[:-1], n // 2 if around.gate else n), None)

    def _dense(
        self,
        rows: Any,
        weight: Any,
        bias: Any,
        y: Any,
        tile: Tile,
        routing: Routing,
        around: Around = ALONE,
        parts: int = 1,
    ) -> None:
        """`rows[M, K] @ weight[N, K].T`, or by each tile's expert of `weight[E, N, K]`."""
        n, k = weight.shape[-2:]
        rows, row_scales, norm = self._normed(rows, around.norm)
        tile = tile.split(parts)
        values = {"x_ptr": rows, "weight_ptr": weight, "bias_ptr": bias, "y_ptr": y}
        values |= self._around(rows, row_scales, norm, around, tile, parts, routing, y)
        constants = {"x_stride": row_stride(rows), "N": n, "K": k, **tile.constants, "BK": _depth(k)}
        constants |= {"HAS_BIAS": bias is not None, "SHARED": routing.shared}
        constants |= _forms(rows, norm, row_scales, around, tile, parts)
        self._matrix(DENSE, tile, values, constants)

    def _coded(
        self,
        rows: Any,
        weight: tuple[Any, Any, Any],
        bias: Any,
        y: Any,
        scheme: str,
        tile: Tile,
        routing: Routing,
        around: Around = ALONE,
        parts: int = 1,
        activation: str = "",
        row_scales: Any = None,
    ) -> None:
        """As `_dense`, over codes, scales and zero points; codes of fewer than 8 bits in words. With an
        `activation` rows are codes, too, and `row_scales` theirs."""
        codes, scales, zeros = weight
        parsed = parse_scheme(scheme)
        n, groups = scales.shape[-2:]
        k = rows.shape[1]
        group = group_of(parsed, k)
        norm = None
        if row_scales is None:
            rows, row_scales, norm = self._normed(rows, around.norm)
        tile = tile.split(parts)
        shape = {"x_stride": row_stride(rows), "N": n, "K": k, "GROUPS": groups, "GROUP": group}
        shape |= tile.constants | {"HAS_BIAS": bias is not None, "SHARED": routing.shared}
        shape |= _forms(rows, norm, row_scales, around, tile, parts)
        # In the order of the kernels' parameters.
        last = {"bias_ptr": bias, "y_ptr": y}
        last |= self._around(rows, row_scales, norm, around, tile, parts, routing, y)
        if parsed.bits == 8:
            x_form = parse_activation(activation).codes if activation else ""  # pyright: ignore[reportOptionalMemberAccess]
            form, width = _form(parsed), codes.shape[-1]
            # Integers of both sides are multiplied as they are; other codes become values, four at a time.
            packed = width % 4 == 0 and (x_form, form) != ("int8", "int8")
            own = codes.view(int32_of(scales)) if packed else _as_bytes(codes)
            values = {"x_ptr": rows, "codes_ptr": own, "scales_ptr": scales} | last
            stored = {"STORED": width, "FORM": form, "PACKED": packed, "BK": _depth(group), "X_FORM": x_form}
            self._matrix(BYTES, tile, values, shape | stored)
            return
        values = {"x_ptr": rows, "words_ptr": codes, "scales_ptr": scales, "zeros_ptr": zeros} | last
        num_blocks = codes.shape[-1] // 16
        digits = min(4, group // 32)
        unroll, turns = turns_of_part(blocks(num_blocks, parts), tile.constants["BM"], 4 // digits)
        kind = {"BLOCKS": num_blocks, "DIGITS": digits, "UNROLL": unroll}
        kind |= {"ZERO": 1 << (parsed.bits - 1), "SYMMETRIC": parsed.symmetric}
        # Loads of turns that there are not would take shared memory from other programs.
        ahead = replace(tile, stages=min(tile.stages, turns + 1))
        self._matrix(WORDS, ahead, values, shape | kind)

    def _around(
        self,
        rows: Any,
        row_scales: Any,
        norm: Norm | None,
        around: Around,
        tile: Tile,
        parts: int,
        routing: Routing,
        y: Any,
    ) -> dict[str, Any]:
        """The kernels' parameters behind x, weight, bias and y."""
        partial = arrived = None
        if tile.grid[2] > 1:
            size = tile.constants["BM"] * tile.constants["BN"]
            tiles = tile.grid[0] * tile.grid[1]
            partial = self.empty(rows, (tiles * parts * size,), float32_of(rows))
            arrived = rows.new_zeros((tiles,), dtype=int32_of(rows)) if self.arrived is None else self.arrived
        residual = None if around.residual is None else self._dense_rows(around.residual)
        values = {"norm_ptr": None if norm is None else norm.weight, "row_scales_ptr": row_scales}
        values |= {"residual_ptr": residual, "partial_ptr": partial, "arrived_ptr": arrived}
        values |= routing.values | {"M": y.numel() // y.shape[-1]}
        given = (None, None) if norm is None else (float(norm.eps), float(norm.offset))
        return values | dict(zip(("eps", "offset"), given, strict=True))

    def _normed(self, rows: Any, norm: Norm | None) -> tuple[Any, Any, Norm | None]:
        """Rows and their scales, and what is left to the product: all of a norm where rows are few."""
        if norm is None:
            return rows, None, None
        m, k = rows.shape
        if m <= _NORM_ROWS:
            return rows, None, norm
        out, scales = self.empty(rows, (m, k), None), self.empty(rows, (m,), float32_of(rows))
        values = {"x_ptr": rows, "weight_ptr": norm.weight, "out_ptr": out, "scales_ptr": scales}
        values |= {"eps": float(norm.eps), "offset": float(norm.offset)}
        constants = {"x_stride": row_stride(rows), "WIDTH": k, "BLOCK": power_of_two(k)}
        self.launch(launch_of("normalize.weigh_rows", (m,), values, constants))
        return out, scales, None

    def _rounded(self, rows: Any, activation: str, static: Any, norm: Norm | None) -> tuple[Any, Any]:
        """Codes of rows, or of their norm, and scales of rows."""
        scheme = parse_activation(activation)
        assert scheme is not None
        m, k = rows.shape
        codes = self.empty(rows, (m, k), _int8(rows) if scheme.codes == "int8" else uint8_of(rows))
        scales = self.empty(rows, (m,), float32_of(rows))
        values = {"x_ptr": rows, "static_ptr": static if scheme.static else None}
        values |= {"norm_ptr": None if norm is None else norm.weight, "codes_ptr": codes}
        values |= {"scales_ptr": scales, "eps": None if norm is None else float(norm.eps)}
        values["offset"] = None if norm is None else float(norm.offset)
        block = power_of_two(k)
        how = {"x_stride": row_stride(rows), "WIDTH": k, "BLOCK": block, "FORM": scheme.codes}
        how |= {"STATIC": scheme.static, "NORM": norm is not None}
        warps = max(1, min(8, block // 512))
        self.launch(launch_of("rounding.round_rows", (m,), values, how, warps=warps))
        return codes, scales

    def _dense_rows(self, x: Any) -> Any:
        return x if x.is_contiguous() else self._copied(x)

    def _matrix(self, kernel: str, tile: Tile, values: dict[str, Any], constants: dict[str, Any]) -> None:
        self.launch(launch_of(kernel, tile.grid, values, constants, warps=tile.warps, stages=tile.stages))

    def _rows(self, x: Any) -> Any:
        """x as `[rows, width]` with dense columns; copied only when strides do not allow a view."""
        try:
            flat = x.view(-1, x.shape[-1])
        except RuntimeError:
            return self._copied(x).view(-1, x.shape[-1])
        return flat if flat.stride(1) == 1 else self._copied(flat)

    def _copied(self, x: Any) -> Any:
        copy = self.empty(x, x.shape, None)
        copy.copy_(x)
        return copy


@dataclass(frozen=True, slots=True)
class Tile:
    """Blocks of one product: rows of x and rows of the weight a program takes, and programs for parts of
    K."""

    grid: tuple[int, int, int]
    constants: dict[str, int]
    warps: int
    stages: int

    def split(self, parts: int) -> Tile:
        """With programs of their own for parts of K, where rows are few."""
        apart = parts if self.grid[1] == 1 and self.constants["BM"] <= _APART_ROWS else 1
        return replace(self, grid=(self.grid[0], self.grid[1], apart))


def turns_of_part(num_blocks: int, rows: int, groups: int) -> tuple[int, int]:
    """Of a part of K in words, whose blocks have `groups` sums each: the blocks of a turn of the loop, which
    share half of what a turn takes, and the turns. A short part is one turn, whose loads are all ahead; of a
    long one few blocks of the last turn are beyond the end."""
    # Many rows leave no registers for more; sums of few, and a block's codes, fill tensor memory of sm_100.
    most = 1 if rows > 32 else min(7, 448 // (rows * groups))
    unroll = num_blocks
    if num_blocks > most:
        near = [each for each in (4, 7, 6, 5, 3, 2, 1) if most // 2 < each <= most]
        unroll = min(near, key=lambda each: blocks(num_blocks, each) * each)
    return unroll, blocks(num_blocks, unroll)


def rows_of_program(m: int, scheme: str = NO_SCHEME) -> int:
    """Rows of x that a program of a product of m takes. Sums of four groups of 32 codes of words are made at
    once, which for 128 rows are more than registers of sm_90 and tensor memory of sm_100 hold."""
    parsed = None if scheme == NO_SCHEME else parse_scheme(scheme)
    most = 64 if parsed is not None and parsed.bits < 8 and parsed.group_size == 32 else 128
    return min(most, max(16, power_of_two(m)))


def coded_kernel(scheme: str) -> str:
    """The kernel of products over codes of a scheme."""
    return WORDS if parse_scheme(scheme).bits < 8 else BYTES


def _forms(
    rows: Any, norm: Norm | None, row_scales: Any, around: Around, tile: Tile, parts: int
) -> dict[str, int | bool | str]:
    """The kernels' constants for what is around a product."""
    where = "before" if row_scales is not None else ""
    if norm is not None:
        where = "here" if norm.weight.dtype == rows.dtype and not norm.offset else "offset"
    forms: dict[str, int | bool | str] = {"NORM": where, "GATE": around.gate}
    forms |= {"ADDS": around.residual is not None, "SPLITS": parts, "APART": tile.grid[2] > 1}
    return forms


def _depth(k: int) -> int:
    """The step along K: a function of the layer alone."""
    return next((step for step in (128, 64, 32) if k % step == 0), 64)


def group_of(scheme: QuantScheme, width: int) -> int:
    """Codes that share a scale; whole blocks of words where a row has one scale."""
    if scheme.group_size:
        return scheme.group_size
    return scheme.padded_in_features(width) if scheme.bits == 8 else 128 * blocks(width, 128)


def _form(scheme: QuantScheme) -> str:
    """What the one-byte codes of a weight are."""
    return "int8" if scheme.code_type == "int" else "fp8"


def _as_bytes(codes: Any) -> Any:
    """e4m3 by its bits, which not every GPU has the type for."""
    return codes if str(codes.dtype) == "torch.int8" else codes.view(uint8_of(codes))


def _int8(x: Any) -> Any:
    """torch.int8, without importing torch."""
    return x.new_empty(0).char().dtype


def int32_of(x: Any) -> Any:
    """torch.int32, without importing torch."""
    return x.new_empty(0).int().dtype


def uint8_of(x: Any) -> Any:
    """torch.uint8, without importing torch."""
    return x.new_empty(0).byte().dtype


def float32_of(x: Any) -> Any:
    """torch.float32, without importing torch."""
    return x.new_empty(0).float().dtype


def expect_scheme(scheme: str, group: int, activation: str) -> None:
    parsed, rounded = parse_scheme(scheme), parse_activation(activation)
    problem = ""
    if rounded is not None and (rounded.codes == "int16" or rounded.group_size or parsed.bits != 8):
        problem = f"its activations are rounded as {activation}, and kernels have int8_token, fp8_token and "
        problem += "fp8_static, by codes of 8 bits"
    elif parsed.code_type not in ("int", "fp8") or parsed.block_rows:
        problem = "its codes are a table's, or rows share their scales"
    elif parsed.bits == 8 and not parsed.symmetric:
        problem = "its one-byte codes have zero points"
    elif parsed.bits != 8 and (group % 32 or (group % 128 and group not in (32, 64))):
        problem = f"its groups have {group} codes, not 32, 64 or a multiple of 128"
    if problem:
        raise TargetError(
            "cuda.scheme",
            f"A matrix of scheme {scheme!r} has no kernel on this target.",
            f"The reason: {problem}.",
            "Compile with int4 or int3 in groups of 32, 64 or 128, int8 or fp8; or with --target reference.",
        )
