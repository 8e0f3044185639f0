"""AutoRound as a judge, its default and its light recipe. Runs where it is installed."""

from __future__ import annotations

from typing import Any

import torch
from auto_round import AutoRound
from checkpoint import Quantised, Work, drive
from transformers import AutoTokenizer

_RECIPES: dict[str, dict[str, Any]] = {"default": {"iters": 200}, "light": {"iters": 50, "lr": 5e-3}}


def quantise(work: Work, model: Any) -> Quantised:
    """Dequantised weights of every linear but the head."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    ]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in work.tokens]
    loader = torch.utils.data.DataLoader(rows, batch_size=8)
    rounder = AutoRound(
        model,
        AutoTokenizer.from_pretrained(work.folder),
        bits=work.bits,
        group_size=work.group_size,
        sym=True,
        dataset=loader,
        seqlen=work.tokens.shape[1],
        nsamples=len(rows),
        **_RECIPES[work.method],
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    )
    done, _ = rounder.quantize()
    modules = dict(done.named_modules())
    return done, {name: modules[name].weight for name in names}


if __name__ == "__main__":
    drive(tuple(_RECIPES), quantise)
