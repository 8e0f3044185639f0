"""The int4 weights that users run under torch.compile: gpt-fast's groups of 128 and torch's own kernel for
them, put into a model by torchao where it is installed, else here."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import torch
from device import DEVICE

# Codes that share a scale; what torch's kernel takes of K at a time, in steps of 16.
GROUP, INNER = 128, 8


class Int4Linear(torch.nn.Module):
    """A matrix `[N, K]` of random codes and scales for torch's int4 product."""

    def __init__(self, n: int, k: int) -> None:
        super().__init__()
        if DEVICE == "cpu":
            codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, INNER)
        else:
            codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=DEVICE)
            packed = torch.ops.aten._convert_weight_to_int4pack(codes, INNER)
        self.register_buffer("codes", packed)
        scales = torch.rand(k // GROUP, n, 2, device=DEVICE) * 0.01
        self.register_buffer("scales_and_zeros", scales.to(torch.bfloat16))
        self._width = n

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x[..., K]` times the matrix, `[..., N]`."""
        product = torch.ops.aten._weight_int4pack_mm
        if DEVICE == "cpu":
            product = torch.ops.aten._weight_int4pack_mm_for_cpu
        rows = product(x.reshape(-1, x.shape[-1]).contiguous(), self.codes, GROUP, self.scales_and_zeros)
        return rows.reshape(*x.shape[:-1], self._width)


def use_int4(model: torch.nn.Module) -> str:
    """Replace every linear of a bfloat16 `model`, the head among them; says by what."""
    if DEVICE != "cpu" and find_spec("torchao") is not None:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_

        quantize_(model, Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d"))
        return f"torchao {version('torchao')}"
    for name, module in list(model.named_modules()):
        for child, linear in list(module.named_children()):
            if isinstance(linear, torch.nn.Linear):
                n, k = linear.weight.shape
                assert linear.bias is None, f"{name}.{child} has a bias"
                setattr(module, child, Int4Linear(n, k))
    return f"torch {torch.__version__}, _weight_int4pack_mm"
