"""config.json of an exported checkpoint: the source's own, with what compressed-tensors says about codes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ..quantised.stored import without_quantisation
from .form import Form

_DTYPE_KEYS = ("dtype", "torch_dtype")


def write_config(
    folder: Path, source: Mapping[str, Any], modules: Mapping[str, Form], ignored: Sequence[str], dtype: str
) -> None:
    """Write it; `modules` are the quantised ones by name, `ignored` the linears that are not."""
    config = with_dtype(without_quantisation(source), dtype)
    config["quantization_config"] = quantisation_config(modules, ignored)
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """`config` of a model whose values are stored in `dtype`."""
    changed = dict(config)
    present = [key for key in _DTYPE_KEYS if key in changed]
    changed |= dict.fromkeys(present or ["torch_dtype"], dtype)
    inner = changed.get("text_config")
    if isinstance(inner, dict):
        text = cast("dict[str, Any]", inner)
        changed["text_config"] = text | {key: dtype for key in _DTYPE_KEYS if key in text}
    return changed


def quantisation_config(modules: Mapping[str, Form], ignored: Sequence[str]) -> dict[str, Any]:
    """One group for each form. A single one is for all linears but those ignored, several name theirs."""
    by_form: dict[Form, list[str]] = {}
    for name, form in modules.items():
        by_form.setdefault(form, []).append(name)
    kinds = {form.kind for form in by_form}
    groups = {
        f"group_{index}": form.group(["Linear"] if len(by_form) == 1 else names)
        for index, (form, names) in enumerate(by_form.items())
    }
    return {
        "quant_method": "compressed-tensors",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }
