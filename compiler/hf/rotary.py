"""Rope scaling that would follow the batch is settled once, by the longest sequence compiled for."""

from __future__ import annotations

from torch import nn

from . import adapter


def settle_longrope(model: nn.Module, max_context: int) -> dict[str, str]:
    """Fix the factors of every longrope module of `model` for sequences of up to `max_context` tokens.

    HF chooses per batch, by its longest sequence; a compiled model answers alike in any batch, so it
    chooses once: long factors when `max_context` exceeds the original training length, else short ones.
    Returns what was chosen, for ModelSpec.choices.
    """
    choices: dict[str, str] = {}
    for module in model.modules():
        for prefix, kind in adapter.rope_kinds(module).items():
            if kind != "longrope":
                continue
            border = adapter.longrope_border(module, prefix)
            long = max_context > border
            adapter.set_longrope(module, prefix, max_context)
            relation = ">" if long else "<="
            factors = "long" if long else "short"
            choices["longrope"] = f"{factors} factors: max_context {max_context} {relation} {border}"
    return choices
