"""Whether the values of a tensor are numbers, found in one reading, and what is said where they are not."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec.errors import ModelError


def all_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite; true of integers. Makes no copy of floats of 16 bits and more."""
    if not value.is_floating_point() or not value.numel():
        return True
    if value.dtype.itemsize == 1:
        stored = value.view(torch.uint8)
        return not any(bool((stored == code).any()) for code in _bad_codes(value.dtype))
    # either extreme is NaN where any value is
    return bool(torch.stack(torch.aminmax(value)).isfinite().all())


def is_narrower(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a float of `dtype` does not reach as far as one of `other`."""
    floats = dtype.is_floating_point and other.is_floating_point
    return floats and torch.finfo(dtype).max < torch.finfo(other).max


def refused_values(what: str, value: Tensor) -> ModelError:
    """What to raise when `value`, which is called `what` in the error, is not finite."""
    count = int((~value.float().isfinite()).sum())
    return ModelError(
        "model.not_finite",
        f"{what} holds values that are no numbers.",
        f"{count} of its {value.numel()} values are NaN or infinite.",
        "Restore the checkpoint from where it came from, or check how it was converted.",
    )


def _bad_codes(dtype: torch.dtype) -> list[int]:
    """The bytes that stand for no number in an 8-bit float."""
    codes = torch.arange(256, dtype=torch.uint8)
    return codes[~codes.view(dtype).float().isfinite()].tolist()
