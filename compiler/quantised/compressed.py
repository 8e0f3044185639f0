"""Checkpoints in the compressed-tensors format, as llm-compressor stores them for vLLM.

Format by module: `weight_packed` int32 [N, K * bits / 32] with `weight_shape`, or `weight` int8 or e4m3
[N, K]; `weight_scale`; `weight_zero_point` where asymmetric, packed along N beside packed weights;
`input_scale` for static activations. Codes are signed, packed ones with 2**(bits-1) added.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from ...ir.coded import Dequantized
from ...ir.weights import Expr, Reshape
from ...spec.quant import QuantScheme
from . import fp8
from .module import QuantisedModule, dequantized, transposed, unsupported
from .unpacking import Portable, Shifted, Unpacked, words_for

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_PACKED_BITS = (3, 4, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One of `config_groups`: which modules it is for, and how it rounds weights and inputs."""

    targets: tuple[str, ...]
    bits: int
    is_float: bool
    symmetric: bool
    strategy: str
    group_size: int
    block: tuple[int, int] | None
    activation: str

    def weight(self, module: QuantisedModule) -> Dequantized:
        """The weight `[N, K]` of one module."""
        made = self._floating(module) if self.is_float else self._integer(module)
        return fp8.with_inputs(module, made, self.activation) if self.activation else made

    def _floating(self, module: QuantisedModule) -> Dequantized:
        if self.block is not None:
            return fp8.in_blocks(module, "weight_scale", self.block)
        if self.strategy == "tensor":
            return fp8.per_tensor(module, module.source("weight_scale"))
        if self.strategy == "channel":
            return fp8.per_row(module, "weight_scale")
        raise module.refuse(f"with the strategy {self.strategy!r}", "8-bit floats have channels or blocks.")

    def _integer(self, module: QuantisedModule) -> Dequantized:
        packed = "weight_packed" in module.tensors
        rows, width = _shape(module, packed)
        stored = module.source("weight_scale")
        if self.strategy not in ("group", "channel") or stored.shape[0] != rows:
            raise module.refuse(f"with the strategy {self.strategy!r}", "Integers have groups or channels.")
        num_groups = 1 if len(stored.shape) == 1 else stored.shape[1]
        declared = self.group_size if self.strategy == "group" else -1
        group_size = module.group_size(width, num_groups, declared)
        order = self._column_order(module, group_size)
        scales = module.integer_scales(Reshape(stored, (rows, num_groups)))
        scheme = QuantScheme(
            bits=self.bits, group_size=group_size, symmetric=self.symmetric, scale_dtype=scales.dtype
        )
        codes, offset = self._codes(module, packed, width)
        zeros = None if self.symmetric else self._zeros(module, packed, (rows, num_groups))
        made = dequantized(Portable(codes, scheme, offset, order), scales, zeros, scheme, width)
        return replace(made, order=order)

    def _codes(self, module: QuantisedModule, packed: bool, width: int) -> tuple[Expr, int]:
        """Codes `[N, K]`, and what to subtract to make them signed, or unsigned where asymmetric."""
        middle = 1 << (self.bits - 1)
        if packed:
            rows = module.source("weight_packed").shape[0]
            words = module.source("weight_packed", (rows, words_for(width, self.bits)))
            return Unpacked(words, self.bits, 1, width), middle if self.symmetric else 0
        weight = module.source("weight")
        if weight.dtype != torch.int8 or self.bits > 8:
            raise module.refuse(f"and stored as {weight.dtype}", "Integer codes must be packed, or int8.")
        return weight, 0 if self.symmetric else -middle

    def _zeros(self, module: QuantisedModule, packed: bool, shape: tuple[int, int]) -> Expr:
        rows, groups = shape
        if packed:
            words = module.source("weight_zero_point", (words_for(rows, self.bits), groups))
            return transposed(Unpacked(words, self.bits, 0, rows))
        stored = module.source("weight_zero_point", (rows, groups), (rows,))
        return Shifted(Reshape(stored, shape), 1 << (self.bits - 1))

    def _column_order(self, module: QuantisedModule, group_size: int) -> Expr | None:
        if "weight_g_idx" not in module.tensors:
            return None
        groups = module.value("weight_g_idx").long()
        expected = torch.arange(len(groups)) // (group_size or len(groups))
        if torch.equal(groups, expected) or bool((groups < 0).all()):
            return None
        order = groups.argsort(stable=True)
        if not torch.equal(groups[order], expected):
            raise module.refuse("in groups of unequal size", "Every group but the last must be whole.")
        return module.shared.constant(order)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed:
    """What `quantization_config` says."""

    groups: tuple[Group, ...]

    def weight(self, module: QuantisedModule) -> Dequantized:
        """The weight `[N, K]` of one module."""
        return self._group(module).weight(module)

    def _group(self, module: QuantisedModule) -> Group:
        """The group that names the module; else the one for linears."""
        for group in self.groups:
            if any(_names(target, module.name) for target in group.targets):
                return group
        for group in self.groups:
            if "Linear" in group.targets:
                return group
        raise module.refuse("by no group of quantization_config", "Every quantised weight belongs to one.")


def read_compressed(config: Mapping[str, Any]) -> Compressed:
    """The settings. Raises ModelError for those that cannot be read."""
    if config.get("kv_cache_scheme"):
        raise unsupported(
            "The checkpoint has scales of its own for the KV cache.",
            "Scales of the cache are computed as it is written, with --kv-dtype int8 or fp8.",
        )
    if (config.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise unsupported("The checkpoint is sparse.", "Sparse weights are not read.")
    if config.get("transform_config"):
        raise unsupported(
            "The checkpoint rotates activations as it runs (transform_config).",
            "Rotations that are not folded into the weights are not read.",
        )
    groups = cast("dict[str, dict[str, Any]]", config.get("config_groups") or {})
    made = [_group(name, group, str(config.get("format", ""))) for name, group in groups.items()]
    if not made:
        raise unsupported(
            "The quantization_config has no config_groups.", "They say how weights are rounded."
        )
    return Compressed(groups=tuple(made))


def _group(name: str, group: Mapping[str, Any], default_format: str) -> Group:
    kind = str(group.get("format") or default_format)
    if kind not in (*_FORMATS, "mixed-precision"):
        raise unsupported(
            f"Group {name!r} of the checkpoint is stored as {kind!r}.",
            f"Of compressed-tensors the formats {', '.join(_FORMATS)} are read.",
        )
    if group.get("output_activations"):
        raise unsupported(f"Group {name!r} rounds the outputs of products.", "Only inputs are rounded here.")
    weights = cast("dict[str, Any]", group.get("weights") or {})
    is_float = weights.get("type", "int") == "float"
    bits, strategy = int(weights.get("num_bits", 0)), str(weights.get("strategy") or "tensor")
    if bits not in ((8,) if is_float else _PACKED_BITS):
        raise unsupported(
            f"Group {name!r} has {'floats' if is_float else 'integers'} of {bits} bits.",
            "Integers of 3, 4 and 8 bits and 8-bit floats are read.",
        )
    block = weights.get("block_structure")
    return Group(
        targets=tuple(map(str, group.get("targets", ()))),
        bits=bits,
        is_float=is_float,
        symmetric=bool(weights.get("symmetric", True)),
        strategy=strategy,
        group_size=int(weights.get("group_size") or -1),
        block=(int(block[0]), int(block[1])) if block and strategy == "block" else None,
        activation=_activation(name, group.get("input_activations")),
    )


def _activation(name: str, inputs: Mapping[str, Any] | None) -> str:
    """The scheme for the inputs of a group; "" where they are not rounded."""
    if not inputs:
        return ""
    kind, bits = str(inputs.get("type", "int")), int(inputs.get("num_bits", 0))
    strategy, dynamic = str(inputs.get("strategy") or "tensor"), inputs.get("dynamic", False)
    symmetric = bool(inputs.get("symmetric", True))
    if bits == 8 and symmetric and dynamic is True and strategy in ("token", "group"):
        codes = "fp8" if kind == "float" else "int8"
        return f"{codes}_token" if strategy == "token" else f"{codes}_g{int(inputs['group_size'])}"
    if (bits, kind, dynamic, strategy, symmetric) == (8, "float", False, "tensor", True):
        return "fp8_static"
    how = "dynamic" if dynamic else "static"
    raise unsupported(
        f"Group {name!r} rounds inputs to {'' if symmetric else 'asymmetric '}{how} {kind} of {bits} bits by "
        f"{strategy}.",
        "Inputs of 8 bits are read: dynamic by token or group, or static 8-bit floats with one scale.",
    )


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module or module.endswith("." + target)


def _shape(module: QuantisedModule, packed: bool) -> tuple[int, int]:
    if not packed:
        rows, width = module.source("weight").shape
        return rows, width
    rows, width = (int(size) for size in module.value("weight_shape").tolist())
    return rows, width
