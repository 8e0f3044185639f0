"""FP8 checkpoints: e4m3 weights with one scale a block (DeepSeek), or one a tensor.

Format: weight float8_e4m3fn [N, K]; weight_scale_inv [N / rows, K / columns] for blocks, or weight_scale with
one value; a weight is code * scale in both. input_scale, one value, where activations are rounded statically.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...ir.coded import Dequantized, RepeatedRows
from ...ir.weights import Expr, Reshape
from ...spec.quant import QuantScheme
from .module import QuantisedModule, Scales, dequantized, unsupported

_SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8:
    """What `quantization_config` says about all modules; `block` is (rows, columns), or none."""

    block: tuple[int, int] | None
    static: bool

    def weight(self, module: QuantisedModule) -> Dequantized:
        """The weight `[N, K]` of one module."""
        if self.block is None:
            made = per_tensor(module, module.source("weight_scale"))
            return with_inputs(module, made, "fp8_static" if self.static else "fp8_token")
        made = in_blocks(module, "weight_scale_inv", self.block)
        return replace(made, activation=f"fp8_g{self.block[1]}")


def read_fp8(config: Mapping[str, Any]) -> Fp8:
    """The settings. Raises ModelError for those that cannot be read."""
    fmt = config.get("fmt", "e4m3")
    if fmt not in ("e4m3", "float8_e4m3fn"):
        raise unsupported(
            f"The FP8 checkpoint has weights in the format {fmt!r}.", "The format e4m3 is read."
        )
    block = config.get("weight_block_size")
    static = config.get("activation_scheme", "dynamic") == "static"
    if block is not None and static:
        raise unsupported(
            "The FP8 checkpoint has blocks and static activation scales.", "With blocks they must be dynamic."
        )
    return Fp8(block=None if block is None else (int(block[0]), int(block[1])), static=static)


def codes_of(module: QuantisedModule) -> Expr:
    """The e4m3 weight. Raises ModelError for one of another dtype."""
    weight = module.source("weight")
    if weight.dtype != torch.float8_e4m3fn:
        raise module.refuse(f"and stored as {weight.dtype}", "Floating-point codes must be float8_e4m3fn.")
    return weight


def in_blocks(module: QuantisedModule, part: str, block: tuple[int, int]) -> Dequantized:
    """Codes with one scale for each block of rows and columns."""
    weight, (height, width) = codes_of(module), block
    rows, columns = weight.shape
    scales = float_scales(module, module.source(part, (-(-rows // height), -(-columns // width))))
    scheme = _scheme(scales, group_size=width, block_rows=height)
    return dequantized(weight, scales, None, scheme, columns)


def per_tensor(module: QuantisedModule, scale: Expr) -> Dequantized:
    """Codes with one scale in all, given to every row."""
    weight = codes_of(module)
    if torch.Size(scale.shape).numel() != 1:
        raise module.refuse(f"with scales of shape {list(scale.shape)}", "There must be one scale a tensor.")
    one = float_scales(module, Reshape(scale, (1, 1)))
    scales = Scales(RepeatedRows(one.expr, weight.shape[0], weight.shape[0]), one.dtype)
    return dequantized(weight, scales, None, _scheme(scales), weight.shape[1])


def per_row(module: QuantisedModule, part: str) -> Dequantized:
    """Codes with a scale a row."""
    weight = codes_of(module)
    rows = weight.shape[0]
    stored = module.source(part, (rows, 1), (rows,))
    scales = float_scales(module, Reshape(stored, (rows, 1)))
    return dequantized(weight, scales, None, _scheme(scales), weight.shape[1])


def with_inputs(module: QuantisedModule, made: Dequantized, activation: str) -> Dequantized:
    """`made` with inputs rounded as `activation` says, a static one with the stored scale."""
    if activation != "fp8_static":
        return replace(made, activation=activation)
    scale = module.value("input_scale").float().reshape(-1)
    if scale.numel() != 1 or not bool(scale > 0):
        raise module.refuse("with an input_scale that is no single positive number", "A static scale is one.")
    return replace(made, activation=activation, activation_scale=module.shared.constant(scale))


def float_scales(module: QuantisedModule, expr: Expr) -> Scales:
    """Scales as they are stored. Raises ModelError for a dtype that scales cannot have."""
    if expr.dtype not in _SCALE_DTYPES:
        raise module.refuse(f"with scales of {expr.dtype}", "Scales are floating-point numbers.")
    return Scales(expr, str(expr.dtype).removeprefix("torch."))


def _scheme(scales: Scales, group_size: int = 0, block_rows: int = 0) -> QuantScheme:
    return QuantScheme(
        bits=8, code_type="fp8", group_size=group_size, block_rows=block_rows, scale_dtype=scales.dtype
    )
