"""Quantisation schemes as data. Knows no algorithm: how codes are found is a pass's business."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import RecipeError

_NAME = re.compile(r"int(?P<bits>[348])_(?:g(?P<group>\d+)|channel)(?P<asym>_asym)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """Weight codes of a matrix `[N, K]`, quantised along K.

    `group_size` 0 means one scale per row. Symmetric codes are signed in
    [-2**(bits-1), 2**(bits-1) - 1] with value `code * scale`; asymmetric ones are unsigned in
    [0, 2**bits - 1] with value `(code - zero) * scale`. When `group_size` does not divide K, the
    last group is shorter in meaning and padded with zero codes in storage.
    """

    bits: int
    group_size: int = 0
    symmetric: bool = True
    scale_dtype: str = "float16"

    @property
    def name(self) -> str:
        """The scheme as operators carry it, for example `int4_g32` or `int8_channel_asym`."""
        group = f"g{self.group_size}" if self.group_size else "channel"
        return f"int{self.bits}_{group}" + ("" if self.symmetric else "_asym")

    def num_groups(self, in_features: int) -> int:
        """Groups along K, the padded last one included."""
        return -(-in_features // self.group_size) if self.group_size else 1

    def padded_in_features(self, in_features: int) -> int:
        """K as stored: a whole number of groups, and an even number of codes."""
        stored = self.num_groups(in_features) * self.group_size if self.group_size else in_features
        return stored + stored % 2


def parse_scheme(name: str) -> QuantScheme:
    """The scheme called `name`; inverse of `QuantScheme.name`.

    Raises RecipeError for a name that is no scheme.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise RecipeError(
            "quant.unknown_scheme",
            f"There is no quantisation scheme {name!r}.",
            "A scheme is named like int8_g32, int4_g128, int4_g32_asym or int8_channel.",
            "Use one of these forms.",
        )
    return QuantScheme(
        bits=int(match["bits"]),
        group_size=int(match["group"] or 0),
        symmetric=match["asym"] is None,
    )
