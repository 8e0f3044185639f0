"""Quantisation schemes of weights and activations as data. Knows no algorithm: how codes are found is a
pass's business."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .errors import RecipeError

CodeType = Literal["int", "fp8", "nf4", "fp4"]

_WEIGHT = re.compile(
    r"(?P<type>int|fp|nf)(?P<bits>[348])_"
    r"(?:g(?P<group>[1-9]\d*)|b(?P<rows>[1-9]\d*)x(?P<columns>[1-9]\d*)|channel)"
    r"(?P<asym>_asym)?(?:_s(?P<scale>f16|bf16|f32|e8m0))?"
)
_ACTIVATION = re.compile(r"(?P<codes>int8|int16|fp8)_(?:token|g(?P<group>[1-9]\d*)|(?P<static>static))")
_SCALE_DTYPES = {"f16": "float16", "bf16": "bfloat16", "f32": "float32", "e8m0": "float8_e8m0fnu"}
_SCALE_NAMES = {dtype: name for name, dtype in _SCALE_DTYPES.items()}
_CODE_TYPES: dict[str, CodeType] = {"int": "int", "fp8": "fp8", "nf4": "nf4", "fp4": "fp4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """Weight codes of a matrix `[N, K]`, quantised along K.

    `group_size` 0 means one scale per row; `block_rows` above 0 lets as many consecutive rows share the
    scales of each group (the last block may be shorter). Code types:

    - `int`: symmetric codes are signed in [-2**(bits-1), 2**(bits-1) - 1] with value `code * scale`;
      asymmetric ones are unsigned in [0, 2**bits - 1] with value `(code - zero) * scale`.
    - `fp8`: e4m3 values (OCP 8-bit floating point, no infinities, largest 448) times the scale.
    - `nf4`, `fp4`: indexes into a fixed table of 16 values (`codebook`), times the scale.

    When `group_size` does not divide K, the last group is shorter in meaning and, for integers and tables,
    padded with codes of value zero in storage.
    """

    bits: int
    group_size: int = 0
    symmetric: bool = True
    scale_dtype: str = "float16"
    code_type: CodeType = "int"
    block_rows: int = 0

    @property
    def name(self) -> str:
        """The scheme as operators carry it, for example `int4_g32`, `int8_channel_asym`, `fp8_b128x128`."""
        codes = f"int{self.bits}" if self.code_type == "int" else self.code_type
        extent = f"g{self.group_size}" if self.group_size else "channel"
        if self.block_rows:
            extent = f"b{self.block_rows}x{self.group_size}"
        scale = "" if self.scale_dtype == _default_scale(self.code_type) else _SCALE_NAMES[self.scale_dtype]
        return f"{codes}_{extent}" + ("" if self.symmetric else "_asym") + (f"_s{scale}" if scale else "")

    @property
    def stored_whole(self) -> bool:
        """Whether a code takes a byte of its own; otherwise two share one, even column in the low half."""
        return self.bits == 8

    def num_groups(self, in_features: int) -> int:
        """Groups along K, the padded last one included."""
        return -(-in_features // self.group_size) if self.group_size else 1

    def num_scale_rows(self, out_features: int) -> int:
        """Rows of the stored scales for `out_features` rows of codes."""
        return -(-out_features // self.block_rows) if self.block_rows else out_features

    def padded_in_features(self, in_features: int) -> int:
        """K as stored. Floating-point codes are not padded; others take whole groups and an even number."""
        if self.code_type == "fp8":
            return in_features
        stored = self.num_groups(in_features) * self.group_size if self.group_size else in_features
        return stored + stored % 2


# QLoRA, appendix E: quantiles of the normal distribution with an exact zero, scaled to [-1, 1].
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# OCP Microscaling Formats 1.0, section 5.3.3: e2m1, sign in the highest bit.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def codebook(code_type: CodeType) -> tuple[float, ...]:
    """The 16 values of a table type, by code; empty for types whose codes are their values."""
    return {"nf4": _NF4, "fp4": _FP4}.get(code_type, ())


def parse_scheme(name: str) -> QuantScheme:
    """The scheme called `name`; inverse of `QuantScheme.name`.

    Raises RecipeError for a name that is no scheme.
    """
    match = _WEIGHT.fullmatch(name)
    kind = "" if match is None else match["type"] + ("" if match["type"] == "int" else match["bits"])
    if match is None or kind not in _CODE_TYPES or (kind != "int" and match["asym"]):
        raise RecipeError(
            "quant.unknown_scheme",
            f"There is no quantisation scheme {name!r}.",
            "A scheme is named like int8_g32, int4_g128, int4_g32_asym, int8_channel, fp8_channel, "
            "fp8_b128x128 or nf4_g64.",
            "Use one of these forms.",
        )
    code_type = _CODE_TYPES[kind]
    return QuantScheme(
        bits=int(match["bits"]),
        group_size=int(match["group"] or match["columns"] or 0),
        symmetric=match["asym"] is None,
        scale_dtype=_SCALE_DTYPES[match["scale"]] if match["scale"] else _default_scale(code_type),
        code_type=code_type,
        block_rows=int(match["rows"] or 0),
    )


def _default_scale(code_type: CodeType) -> str:
    return "float32" if code_type == "fp8" else "float16"


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationScheme:
    """How the rows of a product's left operand are rounded before it; always symmetric.

    `codes` is `int8` (top code 127), `int16` (two int8 limbs, top 32512 = 127 * 256) or `fp8` (e4m3, top
    448). A group of `group_size` values of a row (0: the whole row) whose largest magnitude is a has the
    scale a / top, found as the step runs; `static` ones share one scale that is stored with the weight.
    """

    codes: Literal["int8", "int16", "fp8"]
    group_size: int = 0
    static: bool = False

    @property
    def name(self) -> str:
        """The scheme as operators carry it, for example `int8_g32`, `int8_token`, `fp8_static`."""
        if self.static:
            return f"{self.codes}_static"
        return f"{self.codes}_g{self.group_size}" if self.group_size else f"{self.codes}_token"

    @property
    def top(self) -> float:
        """The code that a group's largest magnitude takes."""
        return {"int8": 127.0, "int16": 32512.0, "fp8": 448.0}[self.codes]


def parse_activation(name: str) -> ActivationScheme | None:
    """The activation scheme called `name`; None for "", which keeps activations in the compute dtype.

    Raises RecipeError for a name that is no scheme.
    """
    if not name:
        return None
    match = _ACTIVATION.fullmatch(name)
    if match is None or (match["static"] and match["codes"] != "fp8"):
        raise RecipeError(
            "quant.unknown_activation",
            f"There is no activation scheme {name!r}.",
            "One is named like int8_token, int8_g32, int16_g64, fp8_token or fp8_static; none at all keeps "
            "activations in the compute dtype.",
            "Use one of these forms.",
        )
    codes: dict[str, Literal["int8", "int16", "fp8"]] = {"int8": "int8", "int16": "int16", "fp8": "fp8"}
    return ActivationScheme(
        codes=codes[match["codes"]], group_size=int(match["group"] or 0), static=match["static"] is not None
    )
