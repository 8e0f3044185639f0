"""The llmc operators by launches: which kernel, which blocks, which grid for tensors of given shapes.

Works on anything that has a tensor's shape, strides and dtype, so that a dry walk over fake tensors finds
every kernel that a model needs. Block sizes along K depend on the layer alone: no row's bits depend on its
batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...spec.errors import TargetError
from ...spec.quant import QuantScheme, parse_scheme
from .launch import Launcher, blocks, launch_of, power_of_two

LOG2_E = 1.4426950408889634
# Keys of one step of the recurrence, and of one split of a long context: absolute, never the batch's.
KEY_BLOCK = 64
SPLIT = 1024
_SEARCH_STEPS = 16


# (a tensor, shape, dtype or None) -> a tensor.
Empty = Callable[[Any, tuple[int, ...], Any], Any]


def _new_empty(like: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """From torch's own allocator."""
    return like.new_empty(shape, dtype=dtype or like.dtype)


@dataclass(frozen=True, slots=True)
class CudaOperators:
    """Operators named and called like those of `ir.ops`, results in new tensors of the inputs' device.

    `empty(like, shape, dtype)` makes every tensor that an operator keeps or works in: on the device of
    `like`, and of its dtype where none is given.
    """

    launch: Launcher
    empty: Empty = _new_empty

    def linear(self, x: Any, weight: Any, bias: Any) -> Any:
        """`llmc.linear`."""
        rows = self._rows(x)
        n, k = weight.shape
        y = self.empty(x, (*x.shape[:-1], n), None)
        tile = _tile(rows.shape[0], n)
        values = {"x_ptr": rows, "weight_ptr": weight, "bias_ptr": bias, "y_ptr": y, "M": rows.shape[0]}
        constants = {"x_stride": rows.stride(0), "N": n, "K": k, **tile.constants, "BK": _depth(k)}
        self._matrix("linear.linear", tile, values, constants | {"HAS_BIAS": bias is not None})
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
    ) -> Any:
        """`llmc.quantized_linear`, codes of fewer than 8 bits in words. Raises TargetError for a scheme or
        activation without a kernel."""
        parsed = parse_scheme(scheme)
        rows = self._rows(x)
        n, groups = scales.shape
        group = _group(parsed, x.shape[-1])
        _expect_scheme(scheme, group, activation)
        y = self.empty(x, (*x.shape[:-1], n), None)
        tile = _tile(rows.shape[0], n)
        shape = {"x_stride": rows.stride(0), "N": n, "K": x.shape[-1], "GROUPS": groups, "GROUP": group}
        last = tile.constants | {"HAS_BIAS": bias is not None}
        m = rows.shape[0]
        if parsed.bits == 8:
            if parsed.code_type == "fp8":
                codes = codes.view(_uint8(codes))
            values = {
                "x_ptr": rows,
                "codes_ptr": codes,
                "scales_ptr": scales,
                "bias_ptr": bias,
                "y_ptr": y,
                "M": m,
            }
            form = "int8" if parsed.code_type == "int" else "fp8"
            stored = {"STORED": codes.shape[1], "FORM": form, "BK": _depth(group)}
            self._matrix("linear.linear_bytes", tile, values, shape | last | stored)
            return y
        values = {"x_ptr": rows, "words_ptr": codes, "scales_ptr": scales, "zeros_ptr": zeros}
        values |= {"bias_ptr": bias, "y_ptr": y, "M": m}
        kind = {"BLOCKS": codes.shape[1] // 16, "DIGITS": min(4, group // 32)}
        kind |= {"ZERO": 1 << (parsed.bits - 1), "SYMMETRIC": parsed.symmetric}
        self._matrix("linear.linear_words", tile, values, shape | kind | last)
        return y

    def _matrix(self, kernel: str, tile: _Tile, values: dict[str, Any], constants: dict[str, Any]) -> None:
        self.launch(launch_of(kernel, tile.grid, values, constants, warps=tile.warps, stages=tile.stages))

    def embedding(self, ids: Any, weight: Any) -> Any:
        """`llmc.embedding`."""
        flat = ids.reshape(-1)
        width = weight.shape[1]
        out = self.empty(weight, (*ids.shape, width), None)
        block = min(1024, power_of_two(width))
        values = {"ids_ptr": flat, "table_ptr": weight, "out_ptr": out}
        grid = (flat.shape[0], blocks(width, block))
        self.launch(launch_of("embedding.embedding", grid, values, {"WIDTH": width, "BLOCK": block}))
        return out

    def quantized_embedding(
        self, ids: Any, codes: Any, scales: Any, zeros: Any, scheme: str, width: int, dtype: Any
    ) -> Any:
        """`llmc.quantized_embedding`; `dtype` is torch's."""
        parsed = parse_scheme(scheme)
        flat = ids.reshape(-1)
        group = _group(parsed, width)
        _expect_scheme(scheme, group, "")
        out = self.empty(scales, (*ids.shape, width), dtype)
        block = min(1024, power_of_two(width))
        values = {
            "ids_ptr": flat,
            "codes_ptr": codes,
            "scales_ptr": scales,
            "zeros_ptr": zeros,
            "out_ptr": out,
        }
        constants = {"WIDTH": width, "STORED": codes.shape[1], "GROUPS": scales.shape[1]}
        constants |= {"GROUP": group, "BITS": parsed.bits}
        constants |= {"SYMMETRIC": parsed.symmetric, "BLOCK": block}
        grid = (flat.shape[0], blocks(width, block))
        self.launch(launch_of("embedding.code_embedding", grid, values, constants))
        return out

    def rms_norm(self, x: Any, weight: Any, eps: float, offset: float, style: str) -> Any:
        """`llmc.rms_norm`."""
        return self._normalize(x, None, weight, None, eps, offset, style, centred=False)[0]

    def layer_norm(self, x: Any, weight: Any, bias: Any, eps: float, offset: float, style: str) -> Any:
        """`llmc.layer_norm`."""
        return self._normalize(x, None, weight, bias, eps, offset, style, centred=True)[0]

    def add_rms_norm(
        self, x: Any, residual: Any, weight: Any, eps: float, offset: float, style: str
    ) -> tuple[Any, Any]:
        """`llmc.add_rms_norm`."""
        return self._normalize(x, residual, weight, None, eps, offset, style, centred=False)

    def add_layer_norm(
        self, x: Any, residual: Any, weight: Any, bias: Any, eps: float, offset: float, style: str
    ) -> tuple[Any, Any]:
        """`llmc.add_layer_norm`."""
        return self._normalize(x, residual, weight, bias, eps, offset, style, centred=True)

    def _normalize(
        self,
        x: Any,
        residual: Any,
        weight: Any,
        bias: Any,
        eps: float,
        offset: float,
        style: str,
        *,
        centred: bool,
    ) -> tuple[Any, Any]:
        rows = self._rows(x)
        added = None if residual is None else self._rows(residual)
        width = x.shape[-1]
        dtype = weight.dtype if weight is not None and style == "cast_then_scale" else x.dtype
        out = self.empty(x, x.shape, _wider(x.dtype, dtype))
        total = None if residual is None else self.empty(x, x.shape, _wider(x.dtype, residual.dtype))
        values = {
            "x_ptr": rows,
            "residual_ptr": added,
            "weight_ptr": weight,
            "bias_ptr": bias,
            "out_ptr": out,
        }
        values |= {"total_ptr": total, "eps": float(eps), "offset": float(offset)}
        block = power_of_two(width)
        constants = {
            "x_stride": rows.stride(0),
            "residual_stride": 0 if added is None else added.stride(0),
            "WIDTH": width,
            "BLOCK": block,
            "CENTRED": centred,
            "ADDS": added is not None,
            "HAS_WEIGHT": weight is not None,
            "HAS_BIAS": bias is not None,
            "CAST_FIRST": style == "cast_then_scale",
        }
        warps = max(1, min(8, block // 512))
        self.launch(launch_of("normalize.normalize", (rows.shape[0],), values, constants, warps=warps))
        return out, total

    def gated_activation(self, gate: Any, up: Any, activation: str) -> Any:
        """`llmc.gated_activation`."""
        return self._gated(gate, up, activation)

    def gated_activation_packed(self, gate_up: Any, activation: str) -> Any:
        """`llmc.gated_activation_packed`."""
        width = gate_up.shape[-1] // 2
        return self._gated(gate_up[..., :width], gate_up[..., width:], activation)

    def _gated(self, gate: Any, up: Any, activation: str) -> Any:
        gates, ups = self._rows(gate), self._rows(up)
        width = gate.shape[-1]
        out = self.empty(gate, gate.shape, None)
        block = min(1024, power_of_two(width))
        values = {"gate_ptr": gates, "up_ptr": ups, "out_ptr": out}
        strides = {"gate_stride": gates.stride(0), "up_stride": ups.stride(0)}
        constants = strides | {"WIDTH": width, "BLOCK": block, "ACTIVATION": activation}
        grid = (gates.shape[0], blocks(width, block))
        self.launch(launch_of("activation.gated_activation", grid, values, constants))
        return out

    def rope(self, x: Any, positions: Any, inv_freq: Any, scale: float, style: str, tail: bool) -> Any:
        """`llmc.rope`."""
        return self._rope_write(x, None, None, positions, inv_freq, scale, style, tail, None, None, None)

    def kv_write(self, k: Any, v: Any, k_cache: Any, v_cache: Any, slots: Any) -> Any:
        """`llmc.kv_write`."""
        self._rope_write(None, k, v, None, None, 1.0, "half", False, k_cache, v_cache, slots)
        return k.new_empty(0)

    def rope_kv_write(
        self,
        q: Any,
        k: Any,
        v: Any,
        positions: Any,
        inv_freq: Any,
        scale: float,
        style: str,
        tail: bool,
        k_cache: Any,
        v_cache: Any,
        slots: Any,
    ) -> tuple[Any, Any]:
        """`llmc.rope_kv_write`."""
        out = self._rope_write(q, k, v, positions, inv_freq, scale, style, tail, k_cache, v_cache, slots)
        return out, k.new_empty(0)

    def _rope_write(
        self,
        q: Any,
        k: Any,
        v: Any,
        positions: Any,
        inv_freq: Any,
        scale: float,
        style: str,
        tail: bool,
        k_cache: Any,
        v_cache: Any,
        slots: Any,
    ) -> Any:
        q, k, v = (None if x is None else self._heads(x) for x in (q, k, v))
        some = k if q is None else q
        width = some.shape[2]
        turning = 0 if inv_freq is None else 2 * inv_freq.shape[0]
        out = None if q is None else self.empty(q, q.shape, None)
        values = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "positions_ptr": positions, "inv_freq_ptr": inv_freq}
        values |= {"scale": float(scale), "q_out_ptr": out, "k_cache_ptr": k_cache, "v_cache_ptr": v_cache}
        heads = 0 if q is None else q.shape[1]
        kv_heads = 0 if k is None else k.shape[1]
        constants = {
            "q_stride": 0 if q is None else q.stride(0),
            "k_stride": 0 if k is None else k.stride(0),
            "v_stride": 0 if v is None else v.stride(0),
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "D": width,
            "V": width if v is None else v.shape[2],
            "R": turning,
            "FIRST": width - turning if tail else 0,
            "STYLE": style,
            "TURNS": turning > 0,
            "BLOCK": power_of_two(max(width, 0 if v is None else v.shape[2])),
        }
        grid = (some.shape[0], heads + 2 * kv_heads)
        values["slots_ptr"] = slots
        self.launch(launch_of("rope.rope_kv_write", grid, values, constants, warps=1))
        return out

    def paged_attention(
        self,
        q: Any,
        k_cache: Any,
        v_cache: Any,
        written: Any,
        block_table: Any,
        query_starts: Any,
        positions: Any,
        sinks: Any,
        scale: float,
        window: int,
        softcap: float,
        chunk: int,
    ) -> Any:
        """`llmc.paged_attention`; every sequence of the step has a token in it."""
        q = self._heads(q)
        tokens, heads, width = q.shape
        page, kv_heads, value_width = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
        sequences = query_starts.shape[0] - 1
        out = self.empty(q, (tokens, heads, value_width), None)
        values = {"q_ptr": q, "k_cache_ptr": k_cache, "v_cache_ptr": v_cache, "table_ptr": block_table}
        numbers = {"table_stride": block_table.stride(0), "scale": scale if softcap else scale * LOG2_E}
        numbers["cap"] = float(softcap)
        shape = {"q_stride": q.stride(0), "HEADS": heads, "KV_HEADS": kv_heads, "D": width, "V": value_width}
        shape |= {"D_BLOCK": max(16, power_of_two(width)), "V_BLOCK": max(16, power_of_two(value_width))}
        seen = {"WINDOW": window, "CHUNK": chunk}
        blocked = {"PAGE": page, "BN": KEY_BLOCK, "SPLIT": SPLIT}
        shared = power_of_two(heads // kv_heads)
        if tokens == sequences:
            shape["SHARED_BLOCK"] = max(16, shared)
            splits = blocks(block_table.shape[1] * page, SPLIT)
            state = self.empty(q, (tokens, heads, splits, 2), _float32(q))
            acc = self.empty(q, (tokens, heads, splits, value_width), _float32(q))
            values |= {"positions_ptr": positions, "state_ptr": state, "acc_ptr": acc, **numbers}
            constants = shape | blocked | seen | {"CAPPED": softcap > 0}
            self.launch(launch_of("attention.decode_splits", (tokens, kv_heads, splits), values, constants))
            self._merge_splits(state, acc, positions, sinks, out, shape | {"SPLIT": SPLIT} | seen)
            return out
        rows = max(16, 64 // shared)
        shape |= {"SHARED_BLOCK": shared, "TOKENS": rows}
        values |= {"starts_ptr": query_starts, "positions_ptr": positions, "sinks_ptr": sinks, "out_ptr": out}
        values |= {"num_sequences": sequences, **numbers}
        constants = shape | blocked | seen | {"CAPPED": softcap > 0, "HAS_SINKS": sinks is not None}
        constants["SEARCH"] = _SEARCH_STEPS
        grid = (blocks(tokens, rows) + sequences, kv_heads)
        self.launch(launch_of("attention.paged_attention", grid, values, constants))
        return out

    def _merge_splits(
        self, state: Any, acc: Any, positions: Any, sinks: Any, out: Any, constants: dict[str, Any]
    ) -> None:
        values = {
            "state_ptr": state,
            "acc_ptr": acc,
            "positions_ptr": positions,
            "sinks_ptr": sinks,
            "out_ptr": out,
        }
        values["splits"] = acc.shape[2]
        kept = ("HEADS", "KV_HEADS", "V", "V_BLOCK", "SHARED_BLOCK", "SPLIT", "WINDOW", "CHUNK")
        own = {name: constants[name] for name in kept} | {"HAS_SINKS": sinks is not None}
        grid = (out.shape[0], own["KV_HEADS"])
        self.launch(launch_of("attention.merge_splits", grid, values, own))

    def gather_rows(self, x: Any, rows: Any) -> Any:
        """`llmc.gather_rows`, which is a look-up in a table."""
        table = x.view(x.shape[0], -1) if x.is_contiguous() else self._copied(x).view(x.shape[0], -1)
        return self.embedding(rows, table).view(rows.shape[0], *x.shape[1:])

    def _rows(self, x: Any) -> Any:
        """x as `[rows, width]` with dense columns; copied only when strides do not allow a view."""
        try:
            flat = x.view(-1, x.shape[-1])
        except RuntimeError:
            return self._copied(x).view(-1, x.shape[-1])
        return flat if flat.stride(1) == 1 else self._copied(flat)

    def _heads(self, x: Any) -> Any:
        """x `[T, H, D]` with dense heads; copied only when they are not."""
        is_dense = x.stride(2) == 1 and (x.stride(1) == x.shape[2] or x.shape[1] == 1)
        return x if is_dense else self._copied(x)

    def _copied(self, x: Any) -> Any:
        copy = self.empty(x, x.shape, None)
        copy.copy_(x)
        return copy


@dataclass(frozen=True, slots=True)
class _Tile:
    """Blocks of one product: rows of x and rows of the weight a program takes."""

    grid: tuple[int, int]
    constants: dict[str, int]
    warps: int
    stages: int


def _tile(m: int, n: int) -> _Tile:
    """Few rows take few columns, so that many programs stream the weight; many rows share each weight
    loaded."""
    bm = min(128, max(16, power_of_two(m)))
    bn = 64 if bm < 128 else 128
    return _Tile(
        (blocks(n, bn), blocks(m, bm)), {"BM": bm, "BN": bn}, 4 if bm < 128 else 8, 4 if bm < 64 else 3
    )


def _depth(k: int) -> int:
    """The step along K: a function of the layer alone."""
    return next((step for step in (128, 64, 32) if k % step == 0), 64)


def _group(scheme: QuantScheme, width: int) -> int:
    """Codes that share a scale; whole blocks of words where a row has one scale."""
    if scheme.group_size:
        return scheme.group_size
    return scheme.padded_in_features(width) if scheme.bits == 8 else 128 * blocks(width, 128)


def _wider(a: Any, b: Any) -> Any:
    """The dtype that holds values of both, where one is float32 or they are equal."""
    return a if a == b or str(a) == "torch.float32" else b


def _uint8(x: Any) -> Any:
    """torch.uint8, without importing torch."""
    return x.new_empty(0).byte().dtype


def _float32(x: Any) -> Any:
    """torch.float32, without importing torch."""
    return x.new_empty(0).float().dtype


def _expect_scheme(scheme: str, group: int, activation: str) -> None:
    parsed = parse_scheme(scheme)
    problem = ""
    if activation:
        problem = f"its activations are rounded as {activation}, and kernels take them in the compute dtype"
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
