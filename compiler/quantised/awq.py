"""AWQ checkpoints as AutoAWQ stores them in its GEMM version: `qweight`, `qzeros`, `scales`.

Format: qweight int32 [K, N / 8], eight outputs a word in the order 0 2 4 6 1 3 5 7; qzeros int32 [G, N / 8]
alike; scales float16 [G, N]; a weight is (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...ir.coded import Dequantized
from ...spec.quant import QuantScheme
from .module import QuantisedModule, dequantized, transposed, unsupported
from .unpacking import Portable, Unpacked

MARK = "qweight"
_BITS = 4
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """What `quantization_config` says about all modules."""

    group_size: int

    def weight(self, module: QuantisedModule) -> Dequantized:
        """The weight `[N, K]` of one module."""
        groups, out_features = module.source("scales").shape
        in_features = module.source("qweight").shape[0]
        words = module.source("qweight", (in_features, out_features // 8))
        zero_words = module.source("qzeros", (groups, out_features // 8))
        scales = module.integer_scales(transposed(module.source("scales")))
        scheme = QuantScheme(
            bits=_BITS,
            group_size=module.group_size(in_features, groups, self.group_size),
            symmetric=False,
            scale_dtype=scales.dtype,
        )
        codes = transposed(Unpacked(words, _BITS, 1, out_features, _ORDER))
        zeros = transposed(Unpacked(zero_words, _BITS, 1, out_features, _ORDER))
        return dequantized(Portable(codes, scheme), scales, zeros, scheme, in_features)


def read_awq(config: Mapping[str, Any]) -> Awq:
    """The settings. Raises ModelError for those that cannot be read."""
    bits = config.get("bits", config.get("w_bit"))
    if bits != _BITS:
        raise unsupported(f"The checkpoint has AWQ codes of {bits} bits.", "AWQ codes of 4 bits are read.")
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise unsupported(
            f"The AWQ checkpoint is stored in the version {version!r}.", "The version gemm is read."
        )
    if not config.get("zero_point", True):
        raise unsupported("The AWQ checkpoint has no zero points.", "AWQ codes with zero points are read.")
    return Awq(group_size=int(config.get("group_size", config.get("q_group_size", -1))))
