"""The bars of the CUDA target, judged by what the other parts wrote. Measures nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEAK_GB_S = 4800.0


@dataclass(frozen=True, slots=True)
class Bar:
    """`value(found)` of what parts found, by part; met where it is at least (or at most) `bar`."""

    name: str
    bar: float
    value: Callable[[dict[str, Any]], float]
    at_least: bool = True


def _share(part: str, step: str) -> Callable[[dict[str, Any]], float]:
    return lambda found: found[part][step]["gb_s"] / PEAK_GB_S


def _ratio(over: tuple[str, str, str], under: tuple[str, str, str]) -> Callable[[dict[str, Any]], float]:
    return lambda found: found[over[0]][over[1]][over[2]] / found[under[0]][under[1]][under[2]]


_8B, _1B = "steps llama-3.1-8b", "steps llama-3.2-1b"
_ONE, _MANY = "decode b1 ctx256", "decode b64 ctx1024"


def _prefill_share(found: dict[str, Any]) -> float:
    """Two operations a weight and token, over the measured rate of a large product."""
    step = found[f"{_8B} bf16"]["prefill"]
    return 2 * step["stored_parameters"] * step["tok_s"] / 1e12 / found["limits"]["bf16_tflop_s"]


def _gap_us(found: dict[str, Any]) -> float:
    """What a step costs in the engine beyond its graph."""
    return 1e3 * (
        found["engine llama-3.1-8b bf16"]["decode b1"]["ms_step"] - found[f"{_8B} bf16"][_ONE]["ms"]
    )


def _price(found: dict[str, Any]) -> float:
    """Our products of a decode step of 64 rows over a library's, whose sums may change with the rows."""
    rates = [rate for name, rate in found["products bf16"].items() if name.endswith(" m64")]
    return sum(rate["us"] for rate in rates) / sum(rate["library_us"] for rate in rates) - 1


def _prefill_price(found: dict[str, Any]) -> float:
    """A prefill by our products over one whose products a library multiplies."""
    ours, theirs = (found[f"{_8B} {scheme}"]["prefill"]["ms"] for scheme in ("bf16", "bf16_library"))
    return ours / theirs - 1


BARS = (
    Bar("decode b1 8B bf16, of 4.8 TB/s", 0.75, _share(f"{_8B} bf16", _ONE)),
    Bar(
        "decode b1 8B bf16, of the measured copy rate",
        0.84,
        lambda found: found[f"{_8B} bf16"][_ONE]["gb_s"] / found["limits"]["copy_gb_s"],
    ),
    Bar("decode b1 8B int4 g128, of 4.8 TB/s", 0.55, _share(f"{_8B} int4_g128", _ONE)),
    Bar(
        "decode b1 8B int4 over our bf16",
        2.4,
        _ratio((f"{_8B} int4_g128", _ONE, "tok_s"), (f"{_8B} bf16", _ONE, "tok_s")),
    ),
    Bar(
        "decode b1 8B int4 over compiled int4 of torch",
        1.5,
        _ratio((f"{_8B} int4_g128", _ONE, "tok_s"), ("compiled int4 llama-3.1-8b", _ONE, "tok_s")),
    ),
    Bar("decode b1 8B fp8, of 4.8 TB/s", 0.65, _share(f"{_8B} fp8", _ONE)),
    Bar("decode b1 1B bf16, of 4.8 TB/s", 0.62, _share(f"{_1B} bf16", _ONE)),
    Bar(
        "decode b64 ctx1024 8B bf16 over transformers",
        1.3,
        _ratio((f"{_8B} bf16", _MANY, "tok_s"), ("transformers llama-3.1-8b", _MANY, "tok_s")),
    ),
    Bar(
        "attention decode b8 ctx8192, of 4.8 TB/s",
        0.75,
        lambda found: found["attention"]["b8 ctx8192"]["gb_s"] / PEAK_GB_S,
    ),
    Bar("prefill 8B bf16, of the measured matrix rate", 0.60, _prefill_share),
    Bar("gap between steps of the engine, us", 3.0, _gap_us, at_least=False),
    Bar(
        "CPU idle at b1 8B",
        0.85,
        lambda found: 1 - found["engine llama-3.1-8b bf16"]["decode b1"]["cpu_share"],
    ),
    Bar("start of 8B, s", 8.0, lambda found: found["start llama-3.1-8b bf16"]["seconds"], at_least=False),
    Bar(
        "mixed requests 1B bf16 over transformers",
        5.0,
        lambda found: (
            found["mixed llama-3.2-1b bf16"]["output_tok_s"]
            / found["transformers mixed llama-3.2-1b"]["output_tok_s"]
        ),
    ),
    Bar("price of batch invariance, products of 64 rows", 0.10, _price, at_least=False),
    Bar("price of batch invariance, prefill of 8B", 0.10, _prefill_price, at_least=False),
)


def judged(folder: Path) -> dict[str, dict[str, object]]:
    """Every bar with its value and whether it is met, or which part's figure is missing."""
    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.json")):
        part = json.loads(file.read_text())
        found[part["part"]] = part["found"]
    table: dict[str, dict[str, object]] = {}
    for bar in BARS:
        try:
            value = bar.value(found)
        except (KeyError, ZeroDivisionError) as missing:
            table[bar.name] = {"bar": bar.bar, "missing": str(missing)}
            continue
        met = value >= bar.bar if bar.at_least else value <= bar.bar
        table[bar.name] = {"bar": bar.bar, "value": value, "met": met}
    return table
