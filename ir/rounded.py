"""Activations rounded as kernels round them: the values behind int8 limbs and 8-bit floats."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..spec.quant import ActivationScheme, parse_activation

# Groups whose largest magnitude is below this are zero: their factor would overflow.
SMALLEST_ACTIVATION = 1e-30


def rounded_input(x: Tensor, activation: str, static_scale: Tensor | None = None) -> Tensor:
    """The left operand of a product under activation scheme `activation`: `x` itself for "", else the values
    of `x[..., K]` rounded by `round_rows`, in float32."""
    scheme = parse_activation(activation)
    return x if scheme is None else round_rows(x, scheme, static_scale)


def round_rows(x: Tensor, scheme: ActivationScheme, static_scale: Tensor | None = None) -> Tensor:
    """`x[..., K]` rounded to codes of `scheme` and back, in float32.

    A dynamic group with an infinity or NaN becomes NaN, so that its row says so. `static_scale` is the one
    scale of a static scheme, a float32 tensor of one element; values beyond its range saturate.
    """
    width = x.shape[-1]
    if scheme.static:
        assert static_scale is not None, "a static activation scheme comes with its scale"
        scale = static_scale.float().reshape(())
        return _coded(x.float() / scale, scheme) * scale
    size = scheme.group_size or width
    padded = F.pad(x.float(), (0, -width % size))
    coded = code_groups(padded.unflatten(-1, (-1, size)), scheme)
    return (coded.codes * coded.scales).flatten(-2)[..., :width]


class CodedGroups(NamedTuple):
    """Codes as float32 values `[..., size]` and float32 scales `[..., 1]`; a value is `code * scale`."""

    codes: Tensor
    scales: Tensor


def code_groups(groups: Tensor, scheme: ActivationScheme) -> CodedGroups:
    """Codes of `groups[..., size]`, float32, each group along the last dimension with a scale of its own.

    A group with an infinity or NaN has the scale NaN and codes 0. Integers are found by multiplying with
    top / a as the CPU kernels do, floats by dividing by the scale as vLLM and compressed-tensors do.
    """
    top = groups.abs().amax(-1, keepdim=True)
    tiny, finite = top < SMALLEST_ACTIVATION, top.isfinite()
    scales = torch.where(tiny, 0.0, top / scheme.top)
    # a quotient of tensors: torch would multiply a scalar by the rounded reciprocal
    factors = torch.full_like(top, scheme.top) / top
    scaled = groups / scales if scheme.codes == "fp8" else groups * factors
    codes = torch.where(finite & ~tiny, _coded(scaled, scheme), 0.0)
    return CodedGroups(codes, torch.where(finite, scales, torch.nan))


def _coded(scaled: Tensor, scheme: ActivationScheme) -> Tensor:
    if scheme.codes == "fp8":
        return scaled.clamp(-scheme.top, scheme.top).to(torch.float8_e4m3fn).float()
    return scaled.round()
