"""What `schemes.py` measures: quantisers, their baselines, and the bars of the project."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from llmc.passes.base import Pass, Stage
from llmc.passes.presets import preset_named
from llmc.passes.quantize.awq import Awq
from llmc.passes.quantize.fp8 import Fp8
from llmc.passes.quantize.gptq import Gptq
from llmc.passes.quantize.round_inputs import RoundInputs
from llmc.passes.quantize.rtn import Rtn
from llmc.passes.quantize.scale_search import ScaleSearch

_KEEP_TABLES = {"head_bits": 0, "embedding_bits": 0}
_WHOLE = {"head_bits": 8, "embedding_bits": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One quantiser, the baseline it is compared with, and what the project asks of it.

    `planted` is what it must recover of the baseline's loss where outliers are planted. `scheme` is that of
    judges whose mean KL divergence it may exceed by 2 % at most; with `rivals` only of those methods.
    """

    name: str
    passes: tuple[Pass, ...]
    baseline: str = ""
    max_ratio: float | None = None
    min_same_top: float | None = None
    min_recovered: float | None = None
    planted: float | None = None
    scheme: str = ""
    rivals: tuple[str, ...] = ()
    kv_dtype: Literal["", "int8", "fp8"] = ""


def cases() -> list[Case]:
    """Baselines first. Bars on recovery leave the table and head as they are, so that only matrices count."""
    return [*_baselines(), *_presets(), *_parts()]


def _baselines() -> list[Case]:
    return [
        Case(name="rtn int4 g128", passes=(Rtn(bits=4, group_size=128, **_KEEP_TABLES),)),
        Case(name="rtn int4 g32", passes=(Rtn(bits=4, group_size=32, **_KEEP_TABLES),)),
        Case(name="rtn int3 g128", passes=(Rtn(bits=3, group_size=128, **_KEEP_TABLES),)),
        Case(
            name="rtn w8a8",
            passes=(Rtn(bits=8, group_size=0, **_WHOLE), RoundInputs(scheme="int8_token")),
        ),
    ]


def _of(preset: str) -> tuple[Pass, ...]:
    """The passes by which a preset rounds."""
    return tuple(pass_ for pass_ in preset_named(preset).build() if pass_.stage is Stage.quantise)


def without_tables(preset: str) -> tuple[Pass, ...]:
    """As the preset, but tables and heads stay as they are, as judges leave them."""
    return tuple(
        replace(pass_, **_KEEP_TABLES) if isinstance(pass_, Gptq) else pass_ for pass_ in _of(preset)
    )


def _presets() -> list[Case]:
    return [
        Case(
            name="int4-small",
            passes=without_tables("int4-small"),
            baseline="rtn int4 g128",
            min_recovered=0.6,
            scheme="int4 g128",
        ),
        Case(
            name="int4",
            passes=_of("int4"),
            baseline="rtn int4 g32",
            max_ratio=1.006,
            planted=0.8,
        ),
        Case(
            name="int4-max",
            passes=_of("int4-max"),
            baseline="rtn int4 g32",
            max_ratio=1.003,
        ),
        Case(
            name="int3",
            passes=without_tables("int3"),
            baseline="rtn int3 g128",
            min_recovered=0.65,
            scheme="int3 g128",
        ),
        Case(name="int8", passes=_of("int8"), max_ratio=1.002, min_same_top=0.99),
        Case(name="fp8 weights", passes=(Fp8(inputs=""),), max_ratio=1.010),
        Case(name="fp8", passes=_of("fp8"), max_ratio=1.02),
        Case(name="w8a8", passes=_of("w8a8"), baseline="rtn w8a8", max_ratio=1.02, planted=0.8),
        Case(name="kv int8", passes=(), kv_dtype="int8", max_ratio=1.002),
        Case(name="kv fp8", passes=(), kv_dtype="fp8", max_ratio=1.005),
    ]


def _parts() -> list[Case]:
    """What the presets are made of, and what needs no data."""
    return [
        Case(
            name="int4-fast",
            passes=(ScaleSearch(bits=4, group_size=32, data=False, **_KEEP_TABLES),),
            baseline="rtn int4 g32",
        ),
        Case(
            name="scale_search g128",
            passes=(ScaleSearch(bits=4, group_size=128, **_KEEP_TABLES),),
            baseline="rtn int4 g128",
        ),
        Case(
            name="awq g128",
            passes=(Awq(bits=4, group_size=128), ScaleSearch(bits=4, group_size=128, **_KEEP_TABLES)),
            baseline="rtn int4 g128",
            scheme="int4 g128",
            rivals=("awq", "awq_scale_estimation"),
        ),
    ]
