"""GPTQ checkpoints as AutoGPTQ and GPTQModel store them: `qweight`, `qzeros`, `scales`, `g_idx`.

Format: qweight int32 [K * bits / 32, N], packed along K; qzeros int32 [G, N * bits / 32], holding zero - 1 in
version 1 and the zero in version 2; scales [G, N]; g_idx int32 [K], the group of each input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...ir.coded import Dequantized
from ...ir.weights import Expr
from ...spec.quant import QuantScheme
from .module import QuantisedModule, dequantized, transposed, unsupported
from .unpacking import Portable, Shifted, Unpacked, words_for

MARK = "qweight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """What `quantization_config` says about all modules."""

    bits: int
    group_size: int
    zero_added: int

    def weight(self, module: QuantisedModule) -> Dequantized:
        """The weight `[N, K]` of one module, inputs in stored order where groups were formed in another."""
        groups, out_features = module.source("scales").shape
        rows = module.source("qweight").shape[0]
        in_features = rows * 32 // self.bits
        order = None
        if "g_idx" in module.tensors:
            in_features = module.source("g_idx").shape[0]
        module.source("qweight", (words_for(in_features, self.bits), out_features))
        words = module.source("qzeros", (groups, words_for(out_features, self.bits)))
        group_size = module.group_size(in_features, groups, self.group_size)
        if "g_idx" in module.tensors:
            order = _column_order(module, group_size)
        zeros: Expr | None = Shifted(transposed(Unpacked(words, self.bits, 1, out_features)), self.zero_added)
        middle = 1 << (self.bits - 1)
        symmetric = bool((zeros.evaluate(module.shared.reader) == middle).all())
        scales = module.integer_scales(transposed(module.source("scales")))
        scheme = QuantScheme(
            bits=max(self.bits, 3),  # two-bit codes are codes of three bits, too
            group_size=group_size,
            symmetric=symmetric,
            scale_dtype=scales.dtype,
        )
        codes = Unpacked(module.source("qweight"), self.bits, 0, in_features)
        stored = Portable(codes, scheme, middle if symmetric else 0, order)
        made = dequantized(stored, scales, None if symmetric else zeros, scheme, in_features)
        return replace(made, order=order)


def read_gptq(config: Mapping[str, Any]) -> Gptq:
    """The settings. Raises ModelError for those that cannot be read."""
    bits = config.get("bits")
    if bits not in (2, 3, 4, 8):
        raise unsupported(
            f"The checkpoint has GPTQ codes of {bits} bits.", "Codes of 2, 3, 4 and 8 bits are read."
        )
    changed = [rule for rule in config.get("dynamic") or {} if not str(rule).startswith("-:")]
    if changed:
        raise unsupported(
            f"The GPTQ checkpoint has settings of their own for modules like {changed[0]!r}.",
            "Per-module settings (`dynamic`) other than leaving modules out are not read.",
        )
    kind = config.get("checkpoint_format") or "gptq"
    if kind not in ("gptq", "gptq_v2"):
        raise unsupported(
            f"The GPTQ checkpoint is stored as {kind!r}.", "The formats gptq and gptq_v2 are read."
        )
    return Gptq(
        bits=bits, group_size=int(config.get("group_size", -1)), zero_added=1 if kind == "gptq" else 0
    )


def _column_order(module: QuantisedModule, group_size: int) -> Expr | None:
    """The inputs in the order of their groups; None where they lie so already."""
    groups = module.value("g_idx").long()
    expected = torch.arange(len(groups)) // (group_size or len(groups))
    if torch.equal(groups, expected):
        return None
    order = groups.argsort(stable=True)
    if not torch.equal(groups[order], expected):
        raise module.refuse(
            f"in groups of unequal size (g_idx is no permutation of groups of {group_size})",
            "Every group but the last must have as many inputs as the config says.",
        )
    return module.shared.constant(order)
