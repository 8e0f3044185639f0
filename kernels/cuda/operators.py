"""The llmc operators by launches: which kernel, which blocks, which grid for tensors of given shapes.

Works on anything that has a tensor's shape, strides and dtype, so that a dry walk over fake tensors finds
every kernel that a model needs. Block sizes along K depend on the layer alone: no row's bits depend on its
batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...spec.quant import parse_scheme
from .launch import blocks, launch_of, power_of_two, row_stride
from .mixtures import CudaMixtures
from .products import Around, Norm, expect_scheme, float32_of, group_of, uint8_of

LOG2_E = 1.4426950408889634
# Keys of one step of the recurrence, and of one split of a long context: absolute, never the batch's.
KEY_BLOCK = 64
SPLIT = 1024
_SEARCH_STEPS = 16
_ATTENTION_WARPS = 8


@dataclass(frozen=True, slots=True)
class CudaOperators(CudaMixtures):
    """Operators named and called like those of `ir.ops`, products and mixtures among them."""

    def product(
        self, x: Any, weight: tuple[Any, ...], norm: tuple[Any, ...] | None, gate: str, residual: Any
    ) -> Any:
        """`llmc.linear` or `llmc.quantized_linear` with arguments `weight` behind x, of
        `llmc.rms_norm(x, *norm)`, then `llmc.gated_activation_packed` by `gate` or the sum with `residual`.

        The norm's two roundings are one. Where dtypes differ, operators stay apart: that depends on the layer
        alone. So they do where torch multiplies.
        """
        if self.library_multiplies(x, weight, norm):
            return self._by_library(x, weight, norm, gate, residual)
        around = Around(gate=gate)
        if norm is not None:
            factor, eps, offset, style = norm
            if factor.dtype == x.dtype or style == "scale_then_cast":
                around = replace(around, norm=Norm(factor, eps, offset))
            else:
                x = self.rms_norm(x, *norm)
        adds = residual is not None and residual.dtype == x.dtype
        if adds:
            around = replace(around, residual=residual)
        multiply = self.linear if len(weight) == 2 else self.quantized_linear
        y = multiply(x, *weight, around=around)
        return y if adds or residual is None else y + residual

    def _by_library(
        self, x: Any, weight: tuple[Any, ...], norm: tuple[Any, ...] | None, gate: str, residual: Any
    ) -> Any:
        matrix, bias = weight
        rows = x if norm is None else self.rms_norm(x, *norm)
        flat, turned = rows.reshape(-1, rows.shape[-1]), matrix.t()
        y = flat.matmul(turned) if bias is None else bias.addmm(flat, turned)
        y = y.view(*x.shape[:-1], matrix.shape[0])
        if gate:
            y = self.gated_activation_packed(y, gate)
        return y if residual is None else y + residual

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
        group = group_of(parsed, width)
        expect_scheme(scheme, group, "")
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
            "x_stride": row_stride(rows),
            "residual_stride": 0 if added is None else row_stride(added),
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
        strides = {"gate_stride": row_stride(gates), "up_stride": row_stride(ups)}
        constants = strides | {"WIDTH": width, "BLOCK": block, "ACTIVATION": activation}
        grid = (gates.shape[0], blocks(width, block))
        self.launch(launch_of("activation.gated_activation", grid, values, constants))
        return out

    def rope(self, x: Any, positions: Any, inv_freq: Any, scale: float, style: str, tail: bool) -> Any:
        """`llmc.rope`."""
        caches = (None, None, None, None, None)
        return self._rope_write(x, None, None, positions, inv_freq, scale, style, tail, caches)

    def kv_write(
        self,
        k: Any,
        v: Any,
        k_cache: Any,
        v_cache: Any,
        slots: Any,
        k_scales: Any = None,
        v_scales: Any = None,
    ) -> Any:
        """`llmc.kv_write`."""
        caches = (k_cache, v_cache, slots, k_scales, v_scales)
        self._rope_write(None, k, v, None, None, 1.0, "half", False, caches)
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
        k_scales: Any = None,
        v_scales: Any = None,
    ) -> tuple[Any, Any]:
        """`llmc.rope_kv_write`."""
        caches = (k_cache, v_cache, slots, k_scales, v_scales)
        out = self._rope_write(q, k, v, positions, inv_freq, scale, style, tail, caches)
        return out, k.new_empty(0)

    def normed_rope_kv_write(self, q: Any, k: Any, v: Any, norms: tuple[Any, ...], *rest: Any) -> Any:
        """`llmc.rope_kv_write(q, k, v, *rest)` of `llmc.rms_norm` of q and of k; `norms` are the weights of
        both and eps, offset and style, which they share. Where dtypes differ, operators stay apart."""
        q_weight, k_weight, eps, offset, style = norms
        same = q_weight.dtype == q.dtype and k_weight.dtype == k.dtype
        if not same and style == "cast_then_scale":
            q, k = (self.rms_norm(x, w, eps, offset, style) for x, w in ((q, q_weight), (k, k_weight)))
            return self.rope_kv_write(q, k, v, *rest)
        positions, inv_freq, scale, turn, tail, *caches = rest
        whole = (*caches, None, None)[:5]  # scales are those of caches of codes
        norms = (q_weight, k_weight, float(eps), float(offset), style)
        out = self._rope_write(q, k, v, positions, inv_freq, scale, turn, tail, whole, norms)
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
        caches: tuple[Any, ...],
        norms: tuple[Any, ...] = (None, None, None, None, ""),
    ) -> Any:
        k_cache, v_cache, slots, k_scales, v_scales = caches
        q_norm, k_norm, eps, offset, norm = norms
        codes = _cache_codes(k_cache)
        q, k, v = (None if x is None else self._heads(x) for x in (q, k, v))
        some = k if q is None else q
        width = some.shape[2]
        turning = 0 if inv_freq is None else 2 * inv_freq.shape[0]
        out = None if q is None else self.empty(q, q.shape, None)
        values = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "q_norm_ptr": q_norm, "k_norm_ptr": k_norm}
        values |= {"positions_ptr": positions, "inv_freq_ptr": inv_freq, "scale": float(scale)}
        values |= {"eps": eps, "offset": offset, "q_out_ptr": out}
        values |= {"k_cache_ptr": _as_bytes(k_cache), "v_cache_ptr": _as_bytes(v_cache), "slots_ptr": slots}
        values |= {"k_scales_ptr": k_scales, "v_scales_ptr": v_scales}
        heads = 0 if q is None else q.shape[1]
        kv_heads = 0 if k is None else k.shape[1]
        constants = {
            "q_stride": 0 if q is None else row_stride(q),
            "k_stride": 0 if k is None else row_stride(k),
            "v_stride": 0 if v is None else row_stride(v),
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "D": width,
            "V": width if v is None else v.shape[2],
            "R": turning,
            "FIRST": width - turning if tail else 0,
            "STYLE": style,
            "NORM": norm,
            "TURNS": turning > 0,
            "CODES": codes,
            "BLOCK": power_of_two(max(width, 0 if v is None else v.shape[2])),
        }
        grid = (some.shape[0], heads + 2 * kv_heads)
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
        k_scales: Any = None,
        v_scales: Any = None,
    ) -> Any:
        """`llmc.paged_attention`; every sequence of the step has a token in it."""
        q = self._heads(q)
        tokens, heads, width = q.shape
        page, kv_heads, value_width = k_cache.shape[1], k_cache.shape[2], v_cache.shape[3]
        sequences = query_starts.shape[0] - 1
        out = self.empty(q, (tokens, heads, value_width), None)
        values = {"q_ptr": q, "k_cache_ptr": _as_bytes(k_cache), "v_cache_ptr": _as_bytes(v_cache)}
        values |= {"k_scales_ptr": k_scales, "v_scales_ptr": v_scales, "table_ptr": block_table}
        numbers = {"table_stride": block_table.stride(0), "scale": scale if softcap else scale * LOG2_E}
        numbers["cap"] = float(softcap)
        shape = {
            "q_stride": row_stride(q),
            "HEADS": heads,
            "KV_HEADS": kv_heads,
            "D": width,
            "V": value_width,
        }
        shape |= {"D_BLOCK": max(16, power_of_two(width)), "V_BLOCK": max(16, power_of_two(value_width))}
        seen = {"WINDOW": window, "CHUNK": chunk}
        blocked = {"PAGE": page, "BN": KEY_BLOCK, "SPLIT": SPLIT}
        shared = power_of_two(heads // kv_heads)
        alone, together = attention_rows(shared, max(shape["D_BLOCK"], shape["V_BLOCK"]))
        if tokens == sequences:
            shape["SHARED_BLOCK"] = alone
            splits = blocks(block_table.shape[1] * page, SPLIT)
            state = self.empty(q, (tokens, heads, splits, 2), float32_of(q))
            acc = self.empty(q, (tokens, heads, splits, value_width), float32_of(q))
            values |= {"positions_ptr": positions, "state_ptr": state, "acc_ptr": acc, **numbers}
            constants = shape | blocked | seen | {"CAPPED": softcap > 0, "CODES": _cache_codes(k_cache)}
            grid = (tokens, kv_heads, splits)
            self.launch(launch_of("attention.decode_splits", grid, values, constants, warps=_ATTENTION_WARPS))
            self._merge_splits(state, acc, positions, sinks, out, shape | {"SPLIT": SPLIT} | seen)
            return out
        shape |= {"SHARED_BLOCK": shared, "TOKENS": together // shared}
        values |= {"starts_ptr": query_starts, "positions_ptr": positions, "sinks_ptr": sinks, "out_ptr": out}
        values |= {"num_sequences": sequences, **numbers}
        constants = shape | blocked | seen | {"CAPPED": softcap > 0, "CODES": _cache_codes(k_cache)}
        constants |= {"HAS_SINKS": sinks is not None, "SEARCH": _SEARCH_STEPS}
        grid = (blocks(tokens, shape["TOKENS"]) + sequences, kv_heads)
        self.launch(launch_of("attention.paged_attention", grid, values, constants, warps=_ATTENTION_WARPS))
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

    def _heads(self, x: Any) -> Any:
        """x `[T, H, D]` with dense heads; copied only when they are not."""
        is_dense = x.stride(2) == 1 and (x.stride(1) == x.shape[2] or x.shape[1] == 1)
        return x if is_dense else self._copied(x)


def attention_rows(shared: int, width: int) -> tuple[int, int]:
    """Rows of a program of attention over one token, and over several; `shared` query heads, a power of two,
    have one KV head, and heads have up to `width` elements.

    Few enough that both use the same matrix instructions, of 16 rows, on every architecture, and that warps
    divide the keys of a step alike, so that sums over keys have one order.
    """
    return max(16, shared), max(shared, 32 if width <= 128 else 16)


def _wider(a: Any, b: Any) -> Any:
    """The dtype that holds values of both, where one is float32 or they are equal."""
    return a if a == b or str(a) == "torch.float32" else b


def _as_bytes(cache: Any) -> Any:
    """A cache as kernels read it: e4m3 by its bits."""
    return cache.view(uint8_of(cache)) if _cache_codes(cache) == "fp8" else cache


def _cache_codes(cache: Any) -> str:
    """The form of a cache's codes, empty where it holds values."""
    return {"torch.int8": "int8", "torch.float8_e4m3fn": "fp8"}.get(str(getattr(cache, "dtype", "")), "")
