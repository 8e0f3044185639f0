"""Matrix products by launches: which kernel, which blocks, which grid. Block sizes along K depend on the
layer alone: no row's bits depend on its batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...spec.errors import TargetError
from ...spec.quant import QuantScheme, parse_activation, parse_scheme
from .launch import Launcher, blocks, launch_of, power_of_two, row_stride

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


# Columns that keep a GPU busy with 128 of them a program.
_WIDE = 16384

ALL_ROWS = Routing(None, None, 0)


@dataclass(frozen=True, slots=True)
class CudaProducts:
    """Products named and called like those of `ir.ops`, results in new tensors of the inputs' device.

    `empty(like, shape, dtype)` makes every tensor that an operator keeps or works in: on the device of
    `like`, and of its dtype where none is given.
    """

    launch: Launcher
    empty: Empty = _new_empty

    def linear(self, x: Any, weight: Any, bias: Any) -> Any:
        """`llmc.linear`."""
        rows = self._rows(x)
        n = weight.shape[0]
        y = self.empty(x, (*x.shape[:-1], n), None)
        self._dense(rows, weight, bias, y, _tile(rows.shape[0], n), ALL_ROWS)
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
    ) -> Any:
        """`llmc.quantized_linear`, codes of fewer than 8 bits in words. Raises TargetError for a scheme or
        activation without a kernel."""
        rows = self._rows(x)
        n = scales.shape[0]
        expect_scheme(scheme, group_of(parse_scheme(scheme), x.shape[-1]), activation)
        y = self.empty(x, (*x.shape[:-1], n), None)
        tile = _tile(rows.shape[0], n, wide=parse_scheme(scheme).bits < 8 and n >= _WIDE)
        if activation:
            self._rounded(rows, (codes, scales, bias, y), scheme, activation, activation_scale, tile)
        else:
            self._coded(rows, (codes, scales, zeros), bias, y, scheme, tile, ALL_ROWS)
        return y

    def _dense(self, rows: Any, weight: Any, bias: Any, y: Any, tile: Tile, routing: Routing) -> None:
        """`rows[M, K] @ weight[N, K].T`, or by each tile's expert of `weight[E, N, K]`."""
        n, k = weight.shape[-2:]
        values = {"x_ptr": rows, "weight_ptr": weight, "bias_ptr": bias, "y_ptr": y} | routing.values
        values["M"] = y.numel() // n
        constants = {"x_stride": row_stride(rows), "N": n, "K": k, **tile.constants, "BK": _depth(k)}
        constants |= {"HAS_BIAS": bias is not None, "SHARED": routing.shared}
        self._matrix("linear.linear", tile, values, constants)

    def _coded(
        self,
        rows: Any,
        weight: tuple[Any, Any, Any],
        bias: Any,
        y: Any,
        scheme: str,
        tile: Tile,
        routing: Routing,
    ) -> None:
        """As `_dense`, over codes, scales and zero points; codes of fewer than 8 bits in words."""
        codes, scales, zeros = weight
        parsed = parse_scheme(scheme)
        n, groups = scales.shape[-2:]
        k = rows.shape[1]
        group = group_of(parsed, k)
        shape = {"x_stride": row_stride(rows), "N": n, "K": k, "GROUPS": groups, "GROUP": group}
        shape |= tile.constants | {"HAS_BIAS": bias is not None, "SHARED": routing.shared}
        # In the order of the kernels' parameters.
        last = {"bias_ptr": bias, "y_ptr": y} | routing.values | {"M": y.numel() // n}
        if parsed.bits == 8:
            own = codes.view(uint8_of(codes)) if parsed.code_type == "fp8" else codes
            values = {"x_ptr": rows, "codes_ptr": own, "scales_ptr": scales} | last
            stored = {"STORED": codes.shape[-1], "FORM": _form(parsed), "BK": _depth(group)}
            self._matrix("linear.linear_bytes", tile, values, shape | stored)
            return
        values = {"x_ptr": rows, "words_ptr": codes, "scales_ptr": scales, "zeros_ptr": zeros} | last
        kind = {"BLOCKS": codes.shape[-1] // 16, "DIGITS": min(4, group // 32)}
        kind |= {"ZERO": 1 << (parsed.bits - 1), "SYMMETRIC": parsed.symmetric}
        self._matrix("linear.linear_words", tile, values, shape | kind)

    def _rounded(
        self,
        rows: Any,
        operands: tuple[Any, Any, Any, Any],
        weight_scheme: str,
        activation: str,
        static: Any,
        tile: Tile,
    ) -> None:
        """A product with codes, scales and bias to y, whose rows are rounded to codes first."""
        scheme, parsed = parse_activation(activation), parse_scheme(weight_scheme)
        assert scheme is not None
        weight, weight_scales, bias, y = operands
        weight = weight.view(uint8_of(weight)) if parsed.code_type == "fp8" else weight
        m, k = rows.shape
        codes = self.empty(rows, (m, k), _int8(rows) if scheme.codes == "int8" else uint8_of(rows))
        scales = self.empty(rows, (m,), float32_of(rows))
        values = {"x_ptr": rows, "static_ptr": static if scheme.static else None, "codes_ptr": codes}
        values["scales_ptr"] = scales
        block = power_of_two(k)
        how = {"x_stride": row_stride(rows), "WIDTH": k, "BLOCK": block, "FORM": scheme.codes}
        how["STATIC"] = scheme.static
        warps = max(1, min(8, block // 512))
        self.launch(launch_of("rounding.round_rows", (m,), values, how, warps=warps))
        group = group_of(parsed, k)
        values = {"x_ptr": codes, "x_scales_ptr": scales, "codes_ptr": weight, "scales_ptr": weight_scales}
        values |= {"bias_ptr": bias, "y_ptr": y, "M": m}
        constants = {"N": y.shape[-1], "K": k, "STORED": weight.shape[1], "GROUPS": weight_scales.shape[1]}
        constants |= {"GROUP": group, "X_FORM": scheme.codes, "FORM": _form(parsed), "BK": _depth(group)}
        constants |= tile.constants | {"HAS_BIAS": bias is not None}
        self._matrix("linear.linear_rounded", tile, values, constants)

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
    """Blocks of one product: rows of x and rows of the weight a program takes."""

    grid: tuple[int, int]
    constants: dict[str, int]
    warps: int
    stages: int


def _tile(m: int, n: int, *, wide: bool = False) -> Tile:
    """Few rows take few columns, so that many programs stream the weight, unless there are enough of them
    (`wide`); many rows share each weight loaded."""
    bm = min(128, max(16, power_of_two(m)))
    bn = 128 if wide or bm == 128 else 64
    return Tile(
        (blocks(n, bn), blocks(m, bm)), {"BM": bm, "BN": bn}, 4 if bm < 128 else 8, 4 if bm < 64 else 3
    )


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
