"""NNCF as a judge: AWQ with scale estimation, all it has for torch. Runs where it is installed."""

from __future__ import annotations

from typing import Any

import nncf
import torch
from checkpoint import Quantised, Work, drive
from nncf.torch.quantization.layers import INT4SymmetricWeightsDecompressor, SQMultiply

_HOOKS = "__nncf_hooks.post_hooks."


def quantise(work: Work, model: Any) -> Quantised:
    """Dequantised weights of every linear but the head, and the model that holds the rest."""
    if work.bits != 4:
        raise ValueError(f"NNCF has no {work.bits}-bit codes for torch")
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in work.tokens]
    model.config.use_cache = False
    done = nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_SYM,
        ratio=1.0,
        group_size=work.group_size,
        dataset=nncf.Dataset(rows),
        awq=True,
        scale_estimation=True,
        backup_mode=nncf.BackupMode.NONE,
        subset_size=len(rows),
    )
    modules = dict(done.named_modules())
    if any(isinstance(module, SQMultiply) for module in modules.values()):
        raise ValueError("NNCF left factors on inputs, which weights alone do not say")
    stored = dict(done.named_parameters())
    found: dict[str, torch.Tensor] = {}
    for path, module in modules.items():
        if isinstance(module, INT4SymmetricWeightsDecompressor):
            name = path.removeprefix(_HOOKS).split("__")[0].replace(":", ".")
            found[name.removesuffix(".weight")] = module(stored[name])
    return done, found


if __name__ == "__main__":
    drive(("awq_scale_estimation",), quantise)
