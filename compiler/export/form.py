"""One way of rounding as compressed-tensors stores it: the tensors of a module, and its entry of
`config_groups`. Inverse of `compiler.quantised.compressed`.

Format: github.com/vllm-project/compressed-tensors, compressors `pack_quantized`, `int_quantized` and
`float_quantized`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ir.quantized import QTensor, unpack_codes
from ...spec.errors import UsageError
from ...spec.quant import QuantScheme, parse_activation, parse_scheme

_WORD = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """Codes of `scheme` whose product rounds its input as `activation` says, stored as `kind`. Codes of 3
    bits are stored as the same numbers in 4, which more programs read."""

    scheme: QuantScheme
    activation: str
    kind: str

    @property
    def bits(self) -> int:
        """Bits of a stored code."""
        return max(4, self.scheme.bits)

    @property
    def name(self) -> str:
        """The form in words."""
        return self.scheme.name + (f", inputs {self.activation}" if self.activation else "")

    def group(self, targets: list[str]) -> dict[str, Any]:
        """The entry of `config_groups` for the modules `targets`."""
        scheme = self.scheme
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "float" if scheme.code_type == "fp8" else "int",
            "symmetric": scheme.symmetric,
            "strategy": "group" if scheme.group_size else "channel",
            "group_size": scheme.group_size or None,
            "dynamic": False,
            "observer": "minmax",
        }
        if scheme.block_rows:
            block = [scheme.block_rows, scheme.group_size]
            weights |= {"strategy": "block", "group_size": None, "block_structure": block}
        return {
            "targets": targets,
            "format": self.kind,
            "weights": weights,
            "input_activations": self._inputs(),
            "output_activations": None,
        }

    def _inputs(self) -> dict[str, Any] | None:
        activation = parse_activation(self.activation)
        if activation is None:
            return None
        strategy = "tensor" if activation.static else "group" if activation.group_size else "token"
        return {
            "num_bits": 8,
            "type": "float" if activation.codes == "fp8" else "int",
            "symmetric": True,
            "strategy": strategy,
            "group_size": activation.group_size or None,
            "dynamic": not activation.static,
            "observer": "minmax" if activation.static else None,
        }

    def tensors(self, stored: QTensor, width: int, input_scale: Tensor | None) -> dict[str, Tensor]:
        """The tensors of a module `[N, width]` by short name."""
        codes = unpack_codes(stored.codes, self.scheme)[:, :width]
        found = {"weight_scale": stored.scales}
        if self.kind == "pack-quantized":
            middle = 1 << (self.bits - 1) if self.scheme.symmetric else 0
            found["weight_packed"] = pack_words(codes + middle, self.bits)
            found["weight_shape"] = torch.tensor([codes.shape[0], width])
            if stored.zeros is not None:
                found["weight_zero_point"] = pack_words(stored.zeros.T, self.bits).T
        else:
            found["weight"] = codes if self.scheme.code_type == "fp8" else codes.to(torch.int8)
        if input_scale is not None:
            found["input_scale"] = input_scale.float().reshape(1)
        return {name: tensor.contiguous() for name, tensor in found.items()}


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned `codes [N, n]` in words of 32 bits, the first in the lowest: int32 `[N, ceil(n * bits / 32)]`.
    `bits` divides 32."""
    per_word = _WORD // bits
    padded = F.pad(codes.to(torch.int64), (0, -codes.shape[1] % per_word)).unflatten(1, (-1, per_word))
    words = (padded << (torch.arange(per_word) * bits)).sum(2)
    return torch.where(words >= 1 << (_WORD - 1), words - (1 << _WORD), words).to(torch.int32)


def form_of(name: str, scheme_name: str, activation: str, width: int) -> Form:
    """How the codes of weight `name`, `width` columns wide, are stored.

    Raises UsageError for what the format cannot hold, or what its readers do not compute with, naming the
    nearest that fits.
    """
    scheme = parse_scheme(scheme_name)
    what, nearest = _obstacle(scheme, activation, width)
    if what:
        raise refusal(name, what, nearest)
    if scheme.code_type == "fp8":
        kind = "float-quantized"
    else:
        kind = "int-quantized" if activation else "pack-quantized"
    whole = scheme.group_size >= width and not scheme.block_rows
    return Form(scheme=replace(scheme, group_size=0) if whole else scheme, activation=activation, kind=kind)


def refusal(name: str, what: str, nearest: str) -> UsageError:
    """An error about weight `name`: what it is, and what could be exported in its place."""
    return UsageError(
        "export.form",
        f"The weight {name!r} {what}.",
        "The compressed-tensors format, or what reads it, has no form for that.",
        f"Compile the model again with the nearest that fits: {nearest}.",
    )


def _obstacle(scheme: QuantScheme, activation: str, width: int) -> tuple[str, str]:
    """What keeps these codes from being stored, and the nearest that can be; empty where nothing does."""
    if scheme.code_type == "fp8":
        blocks = f"fp8_g{scheme.group_size}" if scheme.block_rows else None
        if scheme.group_size and not scheme.block_rows:
            return f"has codes of {scheme.name}", "fp8_channel"
        if activation not in ("", blocks) and (blocks or activation not in ("fp8_token", "fp8_static")):
            return f"has codes of {scheme.name} and inputs of {activation}", blocks or "inputs of fp8_token"
        return "", ""
    if scheme.code_type != "int":
        return f"has codes of {scheme.name}", f"int4_g{scheme.group_size or 32}"
    if scheme.block_rows:
        return f"has codes of {scheme.name}", f"int{scheme.bits}_g{scheme.group_size}"
    if scheme.scale_dtype not in ("float16", "bfloat16", "float32"):
        return f"has codes of {scheme.name}", f"int{scheme.bits}_g{scheme.group_size} with float16 scales"
    by_row = scheme.bits == 8 and scheme.symmetric and not 0 < scheme.group_size < width
    if activation and not (activation == "int8_token" and by_row):
        return f"has codes of {scheme.name} and inputs of {activation}", "int8_channel and int8_token (w8a8)"
    if scheme.group_size and scheme.group_size < width and width % scheme.group_size:
        fitting = [size for size in (128, 64, 32) if width % size == 0 and size <= scheme.group_size]
        nearest = f"group_size={fitting[0]}" if fitting else "one scale a row (group_size=0)"
        return f"has {width} columns in groups of {scheme.group_size}, the last of them shorter", nearest
    return "", ""
