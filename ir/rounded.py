"""Activations rounded as kernels round them: the values behind int8 limbs and 8-bit floats."""

from __future__ import annotations

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
    groups = padded.unflatten(-1, (-1, size))
    top = groups.abs().amax(-1, keepdim=True)
    tiny = top < SMALLEST_ACTIVATION
    # a quotient of tensors: torch would multiply a scalar by the rounded reciprocal
    factor = torch.where(tiny, 0.0, torch.full_like(top, scheme.top) / top)
    scale = torch.where(top.isfinite(), torch.where(tiny, 0.0, top / scheme.top), torch.nan)
    return (_coded(groups * factor, scheme) * scale).flatten(-2)[..., :width]


def _coded(scaled: Tensor, scheme: ActivationScheme) -> Tensor:
    if scheme.codes == "fp8":
        return scaled.clamp(-scheme.top, scheme.top).to(torch.float8_e4m3fn).float()
    return scaled.round()
